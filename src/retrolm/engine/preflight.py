"""Refuses questions that can't be answered before the text is read, which may take minutes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UserError
from ..paging import PageTable, page_lengths
from .chunk import query_group
from .encoder import require_room
from .model import RetroLM


def check_questions(lm: RetroLM, num_text_tokens: int, questions: Sequence[str]) -> None:
    """Raise `UserError` for an empty question, or one that leaves no room for a text of that many tokens."""
    size = lm.config.page_size
    prefix, joined = lm.split_head()
    sinks = page_lengths(len(prefix), size)
    lengths = torch.tensor([*sinks, *page_lengths(len(joined) + num_text_tokens, size)])
    table = PageTable(torch.arange(len(lengths)), lengths, max(len(sinks), 1), size)
    for question in questions:
        tokens = lm.question_ids(question)
        own = torch.arange(len(page_lengths(len(tokens), size)))
        require_room(query_group(table, own, tokens, lm.config, window=0), lm.config)


def count_tokens(lm: RetroLM, text: str) -> int:
    """Tokens of `text` as it is read, the chat template's head left out; raises `UserError` without a tokenizer."""
    if lm.format is None:
        raise UserError("This model has no tokenizer, which reading text needs.")
    return len(lm.format.encode(text))
