"""Token methods that choose whole pages for each generated token after a dense prefill (Quest, ArkVale).

A method scores the pages; forced pages, budget and ties are the base's business. Shape letters as in `token_base`, and
P pages of the longest sample.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .knobs import positive
from .token_base import ChunkView, Part, TokenMethod, distance, places_of, true_at


class PagedTokenMethod(TokenMethod):
    """Base of methods that score fixed pages of the cache with the newest token's queries.

    Knobs have `page` (tokens of a page) and `num_dense_layers` (first layers that attend everything).

    Attributes:
        num_first_pages, num_last_pages: pages that are always chosen; the current page is the last of them.
    """

    prefill = "dense"
    unit = "page of 16 tokens"
    query = "newest token's queries"
    when = "each generated token"
    keeps = "all tokens, on the device"
    positions = "true"
    exact_when = "kv_budget ≥ prompt and answer"
    true_positions = True
    num_first_pages: ClassVar[int] = 0
    num_last_pages: ClassVar[int] = 1
    knobs: Any

    @abstractmethod
    def page_scores(self, view: ChunkView, page_B1T: Tensor, num_pages: int) -> Tensor:
        """How much each page is worth to the view's one query, [B, J, P]; `page_B1T` is the page of each place."""

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "page")

    def dense_layers(self, num_layers: int) -> frozenset[int]:
        return frozenset(range(min(self.knobs.num_dense_layers, num_layers)))

    def choose(self, view: ChunkView) -> Tensor | None:
        """Pages that the view's one query attends, bool [B, J, P]; None = everything."""
        if view.new.is_prefill or view.layer < self.knobs.num_dense_layers:
            return None
        page_B1T = page_of_places(view, self.knobs.page)
        num_pages = max(map(sum, zip(view.new.before, view.new.num_new, strict=True))) // self.knobs.page + 1
        pages = torch.arange(num_pages, device=page_B1T.device)
        current = (view.true_BQ[:, -1:] // self.knobs.page)[:, None]
        forced = (pages < self.num_first_pages) | (pages > current - self.num_last_pages)
        scores = self.page_scores(view, page_B1T, num_pages)
        best = scores.masked_fill(forced, torch.inf).masked_fill(pages > current, -torch.inf)
        found = best.topk(min(view.kv_budget // self.knobs.page, num_pages), dim=2)
        return torch.zeros_like(best, dtype=torch.bool).scatter(2, found.indices, found.values > -torch.inf)

    def select(self, view: ChunkView) -> list[Part] | None:
        chosen = self.choose(view)
        return None if chosen is None else [self.part_of(view, chosen[:, :, None])]

    def part_of(self, view: ChunkView, chosen_BJQP: Tensor) -> Part:
        """The tokens of the pages chosen for each query that are not behind it, at true positions."""
        there = (view.cache.true_BJT >= 0) & at_pages(chosen_BJQP.any(2), page_of_places(view, self.knobs.page))
        places = places_of(there, chosen_BJQP.shape[2] * view.kv_budget)
        true_BJS = true_at(view.cache, places)
        page_BJS = true_BJS.clamp(min=0).div(self.knobs.page, rounding_mode="floor")
        index = page_BJS[:, :, None].expand(-1, -1, chosen_BJQP.shape[2], -1)
        allowed = chosen_BJQP.gather(3, index) & (distance(view.true_BQ, true_BJS) >= 0)
        return Part(places, allowed, view.true_BQ, true_BJS.clamp(min=0))


def page_of_places(view: ChunkView, page: int) -> Tensor:
    """The page that each cache place belongs to, int64 [B, 1, T]; 0 where nothing is."""
    return view.cache.true_BJT[:, :1].clamp(min=0).div(page, rounding_mode="floor")


def at_pages(chosen_BJP: Tensor, page_B1T: Tensor) -> Tensor:
    """Whether each place's page is chosen, bool [B, J, T]."""
    return chosen_BJP.gather(2, page_B1T.expand(-1, chosen_BJP.shape[1], -1))


def rotated_cache(view: ChunkView) -> tuple[Tensor, Tensor]:
    """Keys at their true positions [B, K, T, D], and which places hold one [B, 1, T, 1]."""
    true_B1T = view.cache.true_BJT
    cos, sin = view.rope(true_B1T.clamp(min=0))
    return rotate(view.cache.keys_BKTD, cos, sin), (true_B1T >= 0)[..., None]


def rotated_query(view: ChunkView) -> Tensor:
    """The newest token's queries at their true position, by KV head, [B, K, G, D], float32 or wider."""
    cos, sin = view.rope(view.true_BQ[:, -1:])
    query = rotate(view.q_BHQD[:, :, -1:], cos[:, None], sin[:, None])[:, :, 0]
    wide = query.to(torch.promote_types(query.dtype, torch.float32))
    return wide.unflatten(1, (view.cache.keys_BKTD.shape[1], -1))


def page_extremes(keys_BKTD: Tensor, there_B1T1: Tensor, page_B1T: Tensor, num_pages: int) -> tuple[Tensor, Tensor]:
    """Least and greatest key of each page by channel, each [B, K, P, D]; +inf and -inf for pages without tokens."""
    into = page_B1T[..., None].expand_as(keys_BKTD)
    empty = keys_BKTD.new_full((*keys_BKTD.shape[:2], num_pages, keys_BKTD.shape[3]), torch.inf)
    low = empty.scatter_reduce(2, into, keys_BKTD.masked_fill(~there_B1T1, torch.inf), "amin")
    high = (-empty).scatter_reduce(2, into, keys_BKTD.masked_fill(~there_B1T1, -torch.inf), "amax")
    return low, high


def bound(query_BKGD: Tensor, low_BKPD: Tensor, high_BKPD: Tensor) -> Tensor:
    """Largest dot product of each query with any key between the corners, [B, K, G, P]."""
    low, high = (x.nan_to_num(0.0, 0.0, 0.0).to(query_BKGD.dtype) for x in (low_BKPD, high_BKPD))
    return query_BKGD.clamp(max=0) @ low.mT + query_BKGD.clamp(min=0) @ high.mT
