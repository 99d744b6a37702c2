"""Samples that are made, not loaded: drafts of any size, before it is known what fits a length."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass
class Draft:
    """A sample of some size: prompt parts, answers, and where the evidence stands in `context` (characters)."""

    context: str
    question: str
    answer_prefix: str
    answers: list[str]
    gold_spans: list[tuple[int, int]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class Generator(ABC):
    """Makes drafts of a wanted size, counted in units of its own (words, lines, documents).

    Attributes:
        step: units that a sample loses when it turns out too long.
        fit_each: fit every sample by itself; else all start from the size that fits sample 0, as RULER does. Samples
            that can't be made short enough are then left out instead of refused.
        fills: samples are meant to fill the length; else they only must not exceed it.
    """

    step: int = 1
    fit_each: ClassVar[bool] = False
    fills: ClassVar[bool] = True

    @abstractmethod
    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """Make sample `index` with `size` units, drawing everything random from `rng`."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the drafts depend on besides size, index and seed, as JSON values (for the cache)."""

    def num_samples(self) -> int | None:
        """How many different samples there are; `None` = any number."""
        return None

    def smallest(self, index: int) -> int:
        """Fewest units that sample `index` can be made of."""
        return 0

    def largest(self, index: int) -> int | None:
        """Most units there are for sample `index`; `None` = no limit."""
        return None

    def natural_size(self, index: int) -> int | None:
        """Units of the sample when no length is asked for; `None` = it has no natural length."""
        return None


def split_template(template: str, text: str, **values: object) -> tuple[str, str]:
    """Fill a prompt template; returns what stands up to the end of the text, and what follows it."""
    head, tail = template.split("{context}")
    return head.format(**values) + text, tail.format(**values)


def find_spans(context: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Character ranges of pieces that occur in the context once."""
    starts = [context.index(piece) for piece in pieces]
    return [(start, start + len(piece)) for start, piece in zip(starts, pieces, strict=True)]
