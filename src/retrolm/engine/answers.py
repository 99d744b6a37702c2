"""From what a query page attended and what was generated after it to `Answer` and `Retrieval`."""

from __future__ import annotations

import torch

from ..paging import PageTable
from .decode_round import Query
from .document import Document
from .prefill import LayerChoice
from .results import Answer, PageUse, Retrieval, Timings


def build_answer(document: Document, query: Query) -> Answer:
    """The answer to one query of `document`."""
    tokens, tokenizer = query.generated, document.lm.tokenizer
    stored = document.encoder.parts.store.bytes()
    return Answer(
        text=tokenizer.decode(tokens, skip_special_tokens=True).strip() if tokenizer is not None else "",
        token_ids=tuple(tokens),
        retrieval=build_retrieval(document, query.table, query.choices),
        attended_tokens=_attended(document, query),
        max_position=query.max_position,
        timings=Timings(document.prefill_s, query.ttft_s, query.tpot_s),
        kv_bytes={"device": stored.device, "host": stored.host, "disk": stored.disk, "cache": query.cache_bytes},
        truncated=not query.ended,
        decode_path=query.decode_path,
    )


def build_retrieval(document: Document, table: PageTable, choices: list[LayerChoice]) -> Retrieval:
    """Which pages of `table` each layer chose."""
    width = max(len(choice.ordinals) for choice in choices)
    page_ids = torch.full((len(choices), width), -1)
    scores = torch.full((len(choices), len(table)), torch.nan)
    for layer, choice in enumerate(choices):
        page_ids[layer, width - len(choice.ordinals) :] = choice.ordinals
        if choice.scores is not None:
            scores[layer, : len(choice.scores)] = choice.scores
    return Retrieval(page_ids, scores, _ranked(document, choices))


def _attended(document: Document, query: Query) -> dict[str, int]:
    found = {"prefill": max(document.peak_attended, query.peak_prefill), "decode": query.peak_decode}
    if document.encoder.kept_window:
        so_far = query.table.num_tokens + len(query.tokens) + len(query.generated)
        found["sliding"] = min(document.encoder.kept_window, so_far)
    return found


def _ranked(document: Document, choices: list[LayerChoice]) -> tuple[PageUse, ...]:
    """Pages of the text by how many layers score them among their best, then by how high they stand there.

    Forced pages earn no vote.
    """
    lm = document.lm
    first = document.table.num_sink if lm.format and lm.format.prefix_ids and lm.config.prefix_page else 0
    votes: dict[int, list[int]] = {}
    places: dict[int, float] = {}
    scoring = [
        (layer, choice.scores)
        for layer, choice in enumerate(choices)
        if choice.scores is not None and layer >= lm.config.num_skip_layers
    ]
    for layer, scores in scoring:
        inside = scores[first : document.num_pages]
        free = max(len(choices[layer].ordinals) - first, 0)
        for place, index in enumerate(inside.topk(min(free, len(inside))).indices.tolist(), start=1):
            votes.setdefault(index + first, []).append(layer)
            places[index + first] = places.get(index + first, 0.0) + 1 / place
    ranked = sorted(votes.items(), key=lambda item: (-len(item[1]), -places[item[0]], item[0]))
    return tuple(document.page_use(page, len(by) / len(scoring), tuple(by)) for page, by in ranked)
