"""What a RULER generator makes, before it is known to fit the length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass
class Draft:
    """A sample of some size: prompt parts, answers, and where the evidence stands in `context` (characters)."""

    context: str
    question: str
    answer_prefix: str
    answers: list[str]
    gold_spans: list[tuple[int, int]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class Generator(Protocol):
    """Makes drafts of a wanted size, counted in the task's own units (words, lines, documents)."""

    @property
    def step(self) -> int:
        """Units that a sample loses when it turns out too long (the benchmark's `incremental`)."""

    def smallest(self, index: int) -> int:
        """Fewest units that sample `index` can be made of."""

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """Make sample `index` with `size` units, drawing everything random from `rng`."""

    def facts(self) -> dict[str, Any]:
        """What the drafts depend on besides size, index and seed, as JSON values (for the cache)."""


def split_template(template: str, text: str, **values: object) -> tuple[str, str]:
    """Fill a prompt template; returns what stands up to the end of the text, and what follows it."""
    head, tail = template.split("{context}")
    return head.format(**values) + text, tail.format(**values)


def find_spans(context: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Character ranges of pieces that occur in the context once."""
    starts = [context.index(piece) for piece in pieces]
    return [(start, start + len(piece)) for start, piece in zip(starts, pieces, strict=True)]
