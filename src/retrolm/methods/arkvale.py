"""ArkVale: pages chosen for each generated token by a box around the mean of their keys' spread."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import METHODS
from .token_base import ChunkView
from .token_pages import PagedTokenMethod, bound, page_extremes, rotated_cache, rotated_query


@METHODS.register("arkvale")
class ArkVale(PagedTokenMethod):
    """Digest "cuboid-mean" (the paper's best) of the keys after RoPE: centre c of their extremes, half-width r the mean
    of |key − c|; a page's score for a query head is the sum over channels of max(q·(c − r), q·(c + r)), and all heads
    share one choice by the sum of their scores.

    The published code holds twice to many times as many tokens in GPU memory as a step attends, recalls evicted pages
    when they are chosen, and so attends what top pages over the whole text give. Here nothing is evicted, and
    `kv_budget` is what a step attends, not that memory (the published split attends half of it, at most 1280 tokens).
    """

    name = "arkvale"
    paper = "https://neurips.cc/virtual/2024/poster/96635"
    summary = (
        "pages of 16 tokens, one choice for all heads, for each generated token by mean-width boxes; dense prefill"
    )
    index = "box of mean width around the keys, after RoPE"
    budget_split = "2 first pages + 2 last pages + best pages of 16 tokens; the first two layers are left dense"
    num_first_pages = 2
    num_last_pages = 2

    @dataclass(frozen=True)
    class Knobs:
        """page: tokens of a page (the paper has 32, its tests 16). num_dense_layers: first layers, all attended."""

        page: int = 16
        num_dense_layers: int = 2

    def check_budget(self, kv_budget: int) -> None:
        self._refuse_budget(kv_budget, 5 * self.knobs.page, "two first pages, two last ones and one to choose")

    def page_scores(self, view: ChunkView, page_B1T: Tensor, num_pages: int) -> Tensor:
        keys, there = rotated_cache(view)
        low, high = page_extremes(keys, there, page_B1T, num_pages)
        centre = ((low + high) / 2).nan_to_num(0.0, 0.0, 0.0)
        into = page_B1T[..., None].expand_as(keys)
        apart = (keys - centre.gather(2, into)).abs().masked_fill(~there, 0.0)
        counts = there.to(keys.dtype).new_zeros(len(keys), 1, num_pages, 1)
        counts = counts.scatter_add(2, page_B1T[..., None], there.to(keys.dtype)).clamp(min=1)
        width = centre.new_zeros(centre.shape).scatter_add(2, into, apart) / counts
        return bound(rotated_query(view), centre - width, centre + width).sum(2).sum(1, keepdim=True)
