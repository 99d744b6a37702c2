"""ArkVale: pages chosen for each generated token by a box around the mean of their keys' spread."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import METHODS
from .token_pages import PagedTokenMethod, page_extremes


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
    heads_share = True

    @dataclass(frozen=True)
    class Knobs:
        """page: tokens of a page (the paper has 32, its tests 16). num_dense_layers: first layers, all attended."""

        page: int = 16
        num_dense_layers: int = 2

    def check_budget(self, kv_budget: int) -> None:
        self._refuse_budget(kv_budget, 5 * self.knobs.page, "two first pages, two last ones and one to choose")

    def corners(self, keys_BKPWD: Tensor, there_B1PW1: Tensor) -> tuple[Tensor, Tensor]:
        low, high = page_extremes(keys_BKPWD, there_B1PW1)
        centre = (low + high) / 2
        apart = (keys_BKPWD - centre[:, :, :, None]).abs().masked_fill(~there_B1PW1, 0.0)
        width = apart.sum(3) / there_B1PW1.sum(3).clamp(min=1)
        return centre - width, centre + width

    def page_scores(self, bounds_BKGP: Tensor) -> Tensor:
        return bounds_BKGP.sum((1, 2))[:, None]
