"""Pages at random: the floor that any index must beat."""

from __future__ import annotations

from torch import Tensor

from .base import METHODS, PageMethod, PageTensors

_STEP = 0.6180339887498949


@METHODS.register("random")
class RandomMethod(PageMethod):
    """Scores from a fixed hash of (layer, current page, past page): the same run gives the same pages."""

    name = "random"
    paper = "https://arxiv.org/abs/2502.11444"
    summary = "pages at random, from a fixed hash"
    index = "none: a hash"
    digest_is_place = True
    reads_queries = False

    def digest(self, pages: PageTensors) -> Tensor:
        return (pages.ordinals[:, None] + 1).double()

    def probe(self, pages: PageTensors) -> Tensor:
        return (pages.ordinals[:, None] * 31 + pages.layer * 7 + 1).double()

    def score(self, probe_NF: Tensor, digest_PE: Tensor) -> Tensor:
        mixed = (probe_NF * _STEP).frac() * 7919 + (digest_PE.T * _STEP).frac() * 104729
        return (mixed.sin() * 43758.5453).frac().abs().float()
