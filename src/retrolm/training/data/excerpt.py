"""A passage, or a part of one, with the places at which its sentences begin."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from .pool import TokenPool
from .sample import Span, TokenArray


@dataclass(frozen=True, eq=False)
class Excerpt:
    """Token ids int32 [T] and the ascending token offsets of the sentences in them (the first is 0)."""

    ids: TokenArray
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def passage(cls, pool: TokenPool, index: int) -> Excerpt:
        """Take a whole passage of a pool."""
        return cls(pool.passage(index), tuple(pool.passage_sentences(index)))

    def without(self, span: Span) -> Excerpt:
        """Take the tokens of a span out."""
        start, end = span
        kept = [*(s for s in self.starts if s <= start), *(s - (end - start) for s in self.starts if s > end)]
        return Excerpt(np.concatenate([self.ids[:start], self.ids[end:]]), tuple(dict.fromkeys(kept)))

    def window(self, begin: int, limit: int) -> Excerpt:
        """Take at most `limit` tokens from `begin` on."""
        inside = (start - begin for start in self.starts if begin < start < begin + limit)
        return Excerpt(self.ids[begin : begin + limit], (0, *inside))

    def around(self, focus: Span, limit: int, rng: random.Random) -> Excerpt:
        """Take at most `limit` tokens that hold the focus at a random place; from the start if focus is (-1, -1)."""
        if len(self) <= limit:
            return self
        start, end = focus
        if start < 0:
            return self.window(0, limit)
        low, high = sorted((max(0, min(end, len(self)) - limit), min(start, len(self) - limit)))
        return self.window(rng.randint(low, high), limit)

    def anywhere(self, limit: int, rng: random.Random) -> Excerpt:
        """Take at most `limit` tokens from a random place."""
        return self if len(self) <= limit else self.window(rng.randrange(len(self) - limit), limit)
