"""Which kind of sample stands at which index: exact weights, no repeats before a kind is used up, no state.

Sample i is a pure function of (seed, i): workers and resumed runs need nothing but the index.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from .config import Stage1DataConfig

CYCLE = 1000


class Schedule:
    """A cycle of mixture parts, repeated for ever; in each cycle every part has its weight's share of places.

    Args:
        weights: part -> positive weight; parts with weight 0 are left out.
        seed: shuffles the cycle and each part's rows.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self._seed = seed
        self.shares = _shares(weights)
        cycle = [part for part, count in sorted(self.shares.items()) for _ in range(count)]
        random.Random(f"{seed}:cycle").shuffle(cycle)
        self._cycle = cycle
        self._occurrence = _occurrences(cycle)
        self._order = lru_cache(64)(self._shuffled)

    def part(self, index: int) -> tuple[str, int]:
        """Return the part at an index and how many samples of this part came before."""
        lap, place = divmod(index, len(self._cycle))
        part = self._cycle[place]
        return part, lap * self.shares[part] + self._occurrence[place]

    def item(self, part: str, occurrence: int, count: int) -> int:
        """Return which of a part's `count` rows its n-th sample uses: each row once before any is used again."""
        epoch, place = divmod(occurrence, count)
        return int(self._order(part, epoch, count)[place])

    def _shuffled(self, part: str, epoch: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        seed = random.Random(f"{self._seed}:{part}:{epoch}").getrandbits(63)
        return np.random.default_rng(seed).permutation(count)


def _shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Round weights to places in a cycle by largest remainder; every part with a weight gets at least one."""
    total = sum(weights.values())
    exact = {part: CYCLE * weight / total for part, weight in weights.items() if weight > 0}
    shares = {part: max(1, math.floor(value)) for part, value in exact.items()}
    by_remainder = sorted(exact, key=lambda part: (math.floor(exact[part]) - exact[part], part))
    for part in by_remainder[: max(0, CYCLE - sum(shares.values()))]:
        shares[part] += 1
    return shares


def _occurrences(cycle: list[str]) -> list[int]:
    seen: dict[str, int] = {}
    numbers = []
    for part in cycle:
        numbers.append(seen.get(part, 0))
        seen[part] = numbers[-1] + 1
    return numbers


def text_length(config: Stage1DataConfig, index: int) -> int:
    """Return the text length of sample `index` in tokens: log-uniform, equal within a group of samples.

    During the curriculum the longest length grows linearly with the index; long texts (`long_share`) come after it.
    """
    group = index // config.length_group
    shortest, longest = config.min_tokens, config.max_tokens
    done = group * config.length_group / config.length_curriculum if config.length_curriculum else math.inf
    rng = random.Random(f"{config.seed}:length:{group}")
    share, is_long = rng.random(), rng.random() < config.long_share
    if is_long and done >= 1:
        shortest, longest, done = longest, config.long_tokens, done - 1
    longest = round(shortest + min(1.0, done) * (longest - shortest))
    return round(shortest * (longest / shortest) ** share)
