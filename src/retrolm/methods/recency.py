"""Sink and most recent pages only: the streaming baseline at page granularity, and every method's first layer (D7)."""

from __future__ import annotations

from torch import Tensor

from .base import METHODS, PageMethod, PageTensors


@METHODS.register("recency")
class RecencyMethod(PageMethod):
    """A page's score is its index in the document."""

    name = "recency"
    paper = "https://arxiv.org/abs/2309.17453"
    summary = "sink and the most recent pages; no index"
    index = "place in the text"
    digest_is_place = True
    reads_queries = False

    def digest(self, pages: PageTensors) -> Tensor:
        return pages.ordinals[:, None].float()

    def probe(self, pages: PageTensors) -> Tensor:
        return pages.ordinals.new_ones(len(pages.ordinals), 1).float()

    def score(self, probe_NF: Tensor, digest_PE: Tensor) -> Tensor:
        return probe_NF @ digest_PE.T
