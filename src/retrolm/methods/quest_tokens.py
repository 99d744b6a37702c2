"""Quest: dense prefill, then for each generated token the pages of 16 tokens with the best bound on their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .base import METHODS
from .knobs import positive
from .token_base import ChunkView, Part, TokenMethod, distance, places_of, true_at


@METHODS.register("quest")
class Quest(TokenMethod):
    """A page's bound for a query head is the sum over channels of max(q·low, q·high), low and high its keys' extremes
    after RoPE; a KV head takes the largest bound of its query heads (published for one query head per KV head).

    The page of the current token is always chosen, as in the published kernels. The prompt up to its last token is
    read densely (the published LongBench runs feed the question token by token instead).
    """

    name = "quest"
    paper = "https://arxiv.org/abs/2406.10774"
    summary = "pages of 16 tokens per KV head, chosen for each generated token by a bound; dense prefill"
    prefill = "dense"
    budget_split = "pages of 16 tokens, the current one among them; the first two layers are left dense"
    keeps = "all tokens, on the device"
    positions = "true"
    exact_when = "kv_budget ≥ prompt and answer"
    true_positions = True

    @dataclass(frozen=True)
    class Knobs:
        """page: tokens of a page. num_dense_layers: first layers that attend everything."""

        page: int = 16
        num_dense_layers: int = 2

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "page")

    def check_budget(self, kv_budget: int) -> None:
        self._refuse_budget(kv_budget, 3 * self.knobs.page, "the published least of three pages")

    def dense_layers(self, num_layers: int) -> frozenset[int]:
        return frozenset(range(min(self.knobs.num_dense_layers, num_layers)))

    def select(self, view: ChunkView) -> list[Part] | None:
        if view.new.is_prefill or view.layer < self.knobs.num_dense_layers:
            return None
        true_B1T = view.cache.true_BJT
        page_B1T = true_B1T.clamp(min=0).div(self.knobs.page, rounding_mode="floor")
        bounds_BKP = self._bounds(view, page_B1T)
        current = (view.true_BQ // self.knobs.page)[:, None]
        is_current = torch.arange(bounds_BKP.shape[2], device=current.device) == current
        best = bounds_BKP.masked_fill(is_current, torch.inf)
        num_pages = min(view.kv_budget // self.knobs.page, best.shape[2])
        found = best.topk(num_pages, dim=2)
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter(2, found.indices, found.values > -torch.inf)
        in_chosen = chosen.gather(2, page_B1T.expand(-1, chosen.shape[1], -1)) & (true_B1T >= 0)
        places = places_of(in_chosen, num_pages * self.knobs.page)
        true_BKS = true_at(view.cache, places)
        return [Part(places, distance(view.true_BQ, true_BKS) >= 0, view.true_BQ, true_BKS.clamp(min=0))]

    def _bounds(self, view: ChunkView, page_B1T: Tensor) -> Tensor:
        """Largest bound of a KV head's queries on each page, [B, K, P]; -inf where a page has no tokens."""
        true_B1T, keys = view.cache.true_BJT, view.cache.keys_BKTD
        cos, sin = view.rope(true_B1T.clamp(min=0))
        keys = rotate(keys, cos, sin)
        cos, sin = view.rope(view.true_BQ)
        query = rotate(view.q_BHQD, cos[:, None], sin[:, None])[:, :, 0]
        num_pages = max(map(sum, zip(view.new.before, view.new.num_new, strict=True))) // self.knobs.page + 1
        into = page_B1T[..., None].expand_as(keys)
        there = (true_B1T >= 0)[..., None]
        empty = keys.new_full((*keys.shape[:2], num_pages, keys.shape[3]), torch.inf)
        low = empty.scatter_reduce(2, into, keys.masked_fill(~there, torch.inf), "amin")
        high = (-empty).scatter_reduce(2, into, keys.masked_fill(~there, -torch.inf), "amax")
        has_tokens = low[..., 0] < torch.inf
        low, high = (x.nan_to_num(0.0, 0.0, 0.0) for x in (low, high))
        grouped = query.unflatten(1, (keys.shape[1], -1)).to(torch.promote_types(query.dtype, torch.float32))
        bounds = grouped.clamp(max=0) @ low.to(grouped.dtype).mT + grouped.clamp(min=0) @ high.to(grouped.dtype).mT
        return bounds.amax(2).masked_fill(~has_tokens, -torch.inf)
