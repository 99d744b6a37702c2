"""Any prompt continued page by page, its last page acting as the query (D11 a)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from .decode_round import Query
from .encoder import Encoder
from .loading import eos_ids
from .page_reading import cut_pages, paged_text
from .page_words import page_words
from .retro_generation import generator_over
from .sources import require_vocabulary

if TYPE_CHECKING:
    from .model import RetroLM


def continue_prompts(
    lm: RetroLM, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int | None, **options: Any
) -> Tensor:
    """`RetroLM.generate`: int64 [B, T] → [B, T + new], or more rows where several sequences are asked for."""
    rows = torch.atleast_2d(input_ids)
    prompts = _prompts(lm, rows, attention_mask)
    checked = lm.options_for(options, eos_ids(lm.model.generation_config))
    cut = [cut_pages([], ids, lm.config.page_size) for ids in prompts]
    encoder = lm.encoder_over(lm.new_store(sum(map(len, cut))))
    queries = _queries(lm, encoder, cut)
    new = checked.max_new_tokens if max_new_tokens is None else max_new_tokens
    generator_over(encoder).run(queries, new, checked)
    sequences = [tokens for query in queries for tokens in query.sequences]
    return _joined(rows, sequences, checked.pad_id).to(input_ids.device)


def _prompts(lm: RetroLM, rows: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Token ids of each prompt, padding left out."""
    keep = torch.ones_like(rows) if attention_mask is None else torch.atleast_2d(attention_mask)
    prompts = [row[mask.bool()].tolist() for row, mask in zip(rows, keep, strict=True)]
    if not all(prompts):
        raise UserError("Nothing to continue: a prompt has no tokens.")
    for ids in prompts:
        require_vocabulary(lm, ids)
    return prompts


def _queries(lm: RetroLM, encoder: Encoder, cut: list[list[list[int]]]) -> list[Query]:
    """Read all pages but each prompt's last one, which becomes the query."""
    texts = [paged_text(encoder.parts.store, pages[:-1], 0, encoder.parts.config) for pages in cut]
    if any(text.pages for text in texts):
        encoder.read([text for text in texts if text.pages])
    words = [None if lm.tokenizer is None else page_words(lm) for _ in cut]
    return [Query(text.table, pages[-1], pages[:-1], its) for text, pages, its in zip(texts, cut, words, strict=True)]


def _joined(rows: Tensor, sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Prompts with what follows them, on the host; each prompt's sequences stand together."""
    width = max(map(len, sequences))
    out = torch.full((len(sequences), rows.shape[1] + width), pad_id)
    out[:, : rows.shape[1]] = rows.cpu().repeat_interleave(len(sequences) // len(rows), 0)
    for row, tokens in zip(out, sequences, strict=True):
        row[rows.shape[1] : rows.shape[1] + len(tokens)] = torch.tensor(tokens)
    return out
