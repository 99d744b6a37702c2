"""Token methods that choose whole pages for each generated token after a dense prefill (Quest, ArkVale).

A method has a digest of pages and a score from its bounds; forced pages, budget and ties are the base's business. Shape
letters as in `token_base`, and P pages of the longest sample, W tokens of a page, G = H // K.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.paged_attention import PagesToRead, page_bounds
from ..ops.rotary import rotate
from .knobs import positive
from .token_base import ChunkView, Part, TokenMethod, distance, places_of, true_at


@dataclass
class PageState:
    """What methods that revise keep of one layer for the next step; None = nothing.

    Attributes:
        loaded_BJP: position of the last token that each page was loaded for, int64; -1 = none.
        out_BHQD, lse_BHQ: attention outputs of the last step's tokens and log-sum-exp, float32 or wider.
        fresh_BJQ: keys that tokens attended for the first time, summed over steps, int64; None = all that they attend.
    """

    loaded_BJP: Tensor | None = None
    out_BHQD: Tensor | None = None
    lse_BHQ: Tensor | None = None
    fresh_BJQ: Tensor | None = None

    def clear(self) -> None:
        """As before the first step."""
        for x, empty in ((self.loaded_BJP, -1), (self.out_BHQD, 0), (self.lse_BHQ, -torch.inf), (self.fresh_BJQ, 0)):
            if x is not None:
                x.fill_(empty)


class PagedTokenMethod(TokenMethod):
    """Base of methods that score fixed pages of the cache with the newest token's queries.

    Knobs have `page` (tokens of a page) and `num_dense_layers` (first layers that attend everything).

    Attributes:
        num_first_pages, num_last_pages: pages that are always chosen; the current page is the last of them.
        heads_share: whether all heads attend the same pages (J = 1).
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
    heads_share: ClassVar[bool] = False
    knobs: Any

    @abstractmethod
    def corners(self, keys_BKPWD: Tensor, there_B1PW1: Tensor) -> tuple[Tensor, Tensor]:
        """The digest of each page: two corners of a box around its keys, each [B, K, P, D], finite also where a page
        has no tokens.

        Args:
            keys_BKPWD: keys after RoPE, page by page. there_B1PW1: which of them exist, bool.
        """

    @abstractmethod
    def page_scores(self, bounds_BKGP: Tensor) -> Tensor:
        """How much each page is worth to one token, [B, J, P], from the bound of each of its query heads."""

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "page")

    def dense_layers(self, num_layers: int) -> frozenset[int]:
        return frozenset(range(min(self.knobs.num_dense_layers, num_layers)))

    def choose(self, view: ChunkView) -> Tensor | None:
        """Pages that the view's one query attends, bool [B, J, P]; None = everything."""
        if view.new.is_prefill or view.layer < self.knobs.num_dense_layers:
            return None
        num_pages = max(map(sum, zip(view.new.before, view.new.num_new, strict=True))) // self.knobs.page + 1
        corners = self.corners(*cache_in_pages(view, self.knobs.page, num_pages))
        scores = self.page_scores(page_bounds(rotated_query(view), *corners))
        best = scores + self.page_bias(view.true_BQ[:, -1], num_pages)
        found = best.topk(self.num_chosen(view.kv_budget, num_pages), dim=2)
        return torch.zeros_like(best, dtype=torch.bool).scatter(2, found.indices, found.values > -torch.inf)

    def num_chosen(self, kv_budget: int, num_pages: int) -> int:
        """Pages of a choice, of `num_pages` in all."""
        return min(kv_budget // int(self.knobs.page), num_pages)

    def page_bias(self, true_B: Tensor, num_pages: int) -> Tensor:
        """What is added to scores so that pages are chosen always or never, float32 [B, 1, P]: +inf, -inf, else 0.

        Args:
            true_B: positions of the tokens that choose, int64.
        """
        pages = torch.arange(num_pages, device=true_B.device)
        current = true_B.div(self.knobs.page, rounding_mode="floor")[:, None, None]
        forced = (pages < self.num_first_pages) | (pages > current - self.num_last_pages)
        bias = torch.zeros(forced.shape, device=true_B.device).masked_fill(forced, torch.inf)
        return bias.masked_fill(pages > current, -torch.inf)

    # --- steps over a cache of fixed shape, which can be captured -------------------------------------------------

    def new_state(self, keys_BKPWD: Tensor, num_heads: int) -> PageState:
        """What the method keeps of a layer with this cache between steps."""
        return PageState()

    def read_pages(self, state: PageState, pages_BJn: Tensor, true_BQ: Tensor) -> PagesToRead:
        """What a step attends, from the pages chosen for its newest token; pages behind it may be among them."""
        return PagesToRead(pages_BJn)

    def finish(self, state: PageState, out_BHQD: Tensor, lse_BHQ: Tensor) -> Tensor:
        """The step's attention output, from that over what was read."""
        return out_BHQD

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


def cache_in_pages(view: ChunkView, page: int, num_pages: int) -> tuple[Tensor, Tensor]:
    """Keys at their true positions, page by page [B, K, P, W, D], and which exist, bool [B, 1, P, W, 1].

    The cache's tokens stand side by side, the newest at its end.
    """
    lengths_B1 = view.true_BQ[:, -1:] + 1
    true_BT = torch.arange(num_pages * page, device=lengths_B1.device).expand(len(lengths_B1), -1)
    _, K, T, D = view.cache.keys_BKTD.shape
    places_BT = (true_BT + T - lengths_B1).clamp(max=T - 1)
    cos, sin = view.rope(true_BT.minimum(lengths_B1 - 1)[:, None])
    keys = rotate(view.cache.keys_BKTD.gather(2, places_BT[:, None, :, None].expand(-1, K, -1, D)), cos, sin)
    there = (true_BT < lengths_B1)[:, None, :, None]
    return keys.unflatten(2, (-1, page)), there.unflatten(2, (-1, page))


def rotated_query(view: ChunkView) -> Tensor:
    """The newest token's queries at their true position, by KV head, [B, K, G, D], float32 or wider."""
    cos, sin = view.rope(view.true_BQ[:, -1:])
    query = rotate(view.q_BHQD[:, :, -1:], cos[:, None], sin[:, None])[:, :, 0]
    wide = query.to(torch.promote_types(query.dtype, torch.float32))
    return wide.unflatten(1, (view.cache.keys_BKTD.shape[1], -1))


def page_extremes(keys_BKPWD: Tensor, there_B1PW1: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest key of each page by channel, each [B, K, P, D]; zeros for pages without tokens."""
    low = keys_BKPWD.masked_fill(~there_B1PW1, torch.inf).amin(3)
    high = keys_BKPWD.masked_fill(~there_B1PW1, -torch.inf).amax(3)
    empty = ~there_B1PW1.any(3)
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
