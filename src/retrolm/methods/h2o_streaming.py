"""H2O while reading: heavy hitters by accumulated attention and the most recent tokens, for each KV head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import METHODS
from .knobs import positive
from .token_base import ChunkView, NewTokens, Part, TokenCache, TokenMethod, best_places, distance


@METHODS.register("h2o_streaming")
class H2OStreaming(TokenMethod):
    """The cache is cut before each chunk, so that with it no more than the budget is attended.

    A token's score is the attention weight it got from all queries so far (float32 sums, mean over the query heads of
    its KV head); what was evicted never returns. With `chunk=1` this is the published rule, token by token.
    """

    name = "h2o_streaming"
    paper = "https://arxiv.org/abs/2306.14048"
    summary = "tokens with most accumulated attention and the most recent ones, evicted while reading"
    index = "attention it got"
    query = "all queries so far"
    scope = "layer and KV head"
    budget_split = "half heavy hitters + half recent tokens, the current chunk among them"
    keeps = "heavy hitters and recent tokens of each KV head, on the device"
    positions = "inside the cache: 0, 1, 2, …"
    exact_when = "kv_budget ≥ prompt and answer"
    needs_weights = True

    @dataclass(frozen=True)
    class Knobs:
        """num_heavy: tokens kept by score; None = half of the budget. chunk: prompt tokens read at a time."""

        num_heavy: int | None = None
        chunk: int = 256

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "num_heavy", "chunk")

    def check_budget(self, kv_budget: int) -> None:
        self._refuse_budget(kv_budget, self._num_heavy(kv_budget) + 1, "heavy hitters and the current token")

    def chunk_tokens(self, kv_budget: int) -> int:
        return min(self.knobs.chunk, kv_budget - self._num_heavy(kv_budget))

    def select(self, view: ChunkView) -> list[Part]:
        true_BKT = view.cache.true_BJT
        lengths = map(sum, zip(view.new.before, view.new.num_new, strict=True))
        if view.cache.num_places == min(*lengths, view.kv_budget):  # no place is empty
            return [view.once(_full_cache, *true_BKT.shape[::2], view.num_queries, true_BKT.device)]
        placed = (true_BKT >= 0).cumsum(-1).sub(1).clamp(min=0)
        return [Part(None, distance(view.true_BQ, true_BKT) >= 0, placed[:, 0, -view.num_queries :], placed)]

    def observe(self, view: ChunkView, parts: list[Part], weights: list[Tensor]) -> None:
        num_kv_heads = view.cache.keys_BKTD.shape[1]
        mass_BHT = weights[0].sum(2)
        view.cache.add_marks(mass_BHT.unflatten(1, (num_kv_heads, -1)).mean(2))

    def keep(self, cache: TokenCache, new: NewTokens, kv_budget: int) -> Tensor | None:
        if cache.marks_BMT is None or cache.num_places + max(new.num_new) <= kv_budget:
            return None
        kept = tuple(min(length, kv_budget - n) for length, n in zip(new.before, new.num_new, strict=True))
        true_BKT = cache.true_BJT.expand(-1, cache.marks_BMT.shape[1], -1)
        recent_from = new.once(self._recent_from, new.starts, new.counts, kv_budget)
        rank = cache.marks_BMT.masked_fill(true_BKT >= recent_from, torch.inf)
        if cache.num_places > min(*new.before, kv_budget):  # some places are empty
            rank = rank.masked_fill(true_BKT < 0, -torch.inf)
        places = best_places(rank, max(kept))
        if min(kept) < max(kept):
            places = places.masked_fill(new.once(_too_many, kept, places.device), -1)
        return places.sort().values

    def _recent_from(self, starts_B: Tensor, counts_B: Tensor, kv_budget: int) -> Tensor:
        """True position of the first token that stays for being recent, [B, 1, 1]."""
        num_recent = (kv_budget - self._num_heavy(kv_budget) - counts_B).clamp(min=0)
        return (starts_B - num_recent)[:, None, None]

    def _num_heavy(self, kv_budget: int) -> int:
        return kv_budget // 2 if self.knobs.num_heavy is None else self.knobs.num_heavy


def _full_cache(num_samples: int, num_places: int, num_queries: int, device: torch.device) -> Part:
    """All places of a cache without empty ones, as far as they are not behind a query."""
    places = torch.arange(num_places, device=device).expand(num_samples, 1, -1)
    queries = places[:, 0, num_places - num_queries :]
    return Part(None, distance(queries, places) >= 0, queries, places)


def _too_many(kept: tuple[int, ...], device: torch.device) -> Tensor:
    """Which of a sample's best tokens it has no room for, bool [B, 1, most kept]."""
    return torch.arange(max(kept), device=device) >= torch.tensor(kept).to(device, non_blocking=True)[:, None, None]
