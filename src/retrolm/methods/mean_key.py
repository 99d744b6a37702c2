"""Training-free index: the mean query of the current page against the mean key of past pages."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import METHODS, PageTensors, sum_groups, valid_rows
from .head_scores import ScoresHeads


@METHODS.register("mean_key")
class MeanKeyMethod(ScoresHeads):
    """Both means are taken before RoPE over the tokens that exist; one score per layer, summed over heads."""

    name = "mean_key"
    paper = "https://arxiv.org/abs/2402.04617"
    summary = "mean of a page's keys as its index; no training"
    index = "mean key"
    query = "mean query of the current page"

    def digest(self, pages: PageTensors) -> Tensor:
        return _mean(pages.k_NWKD, pages).flatten(1)

    def probe(self, pages: PageTensors) -> Tensor:
        return sum_groups(_mean(pages.q_NWHD, pages), pages.k_NWKD.shape[2]).flatten(1)

    def score(self, probe_NF: Tensor, digest_PE: Tensor) -> Tensor:
        return probe_NF @ digest_PE.T


def _mean(x_NWHD: Tensor, pages: PageTensors) -> Tensor:
    wide = torch.promote_types(x_NWHD.dtype, torch.float32)
    rows = valid_rows(pages)[:, :, None, None]
    return x_NWHD.to(wide).masked_fill(~rows, 0).sum(1) / pages.lengths[:, None, None]
