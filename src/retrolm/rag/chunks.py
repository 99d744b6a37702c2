"""Cutting a text into chunks of tokens, and choosing those that go into the prompt."""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[int, int]


def chunk_spans(num_tokens: int, chunk_tokens: int) -> list[Span]:
    """Half-open token ranges that cover a text in order; all but the last have `chunk_tokens`."""
    return [(at, min(at + chunk_tokens, num_tokens)) for at in range(0, num_tokens, chunk_tokens)]


def best_first(scores: Sequence[float]) -> list[int]:
    """Indices from the best score to the worst; of equal scores the earlier chunk."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def that_fit(spans: Sequence[Span], ranked: Sequence[int], num_chunks: int, room: int) -> list[int]:
    """The best `num_chunks` chunks, without those that would not fit into `room` tokens beside better ones."""
    chosen: list[int] = []
    for index in ranked[:num_chunks]:
        size = spans[index][1] - spans[index][0]
        if size <= room:
            chosen.append(index)
            room -= size
    return chosen
