"""Quest's page bound: per-channel minimum and maximum of a page's keys, scored by the page's last query."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import METHODS, PageMethod, PageTensors, valid_rows


@METHODS.register("quest_pages")
class QuestPagesMethod(PageMethod):
    """Upper bound of any token's score in the page, summed over query heads, keys before RoPE.

    Quest itself selects for each decoded token and head; here its bound chooses whole pages per layer, under the same
    rules as every page method, with the last token of the current page as the query.
    """

    name = "quest_pages"
    paper = "https://arxiv.org/abs/2406.10774"
    summary = "min/max of a page's keys as a bound on its scores; no training"
    index = "least and greatest key by channel"
    query = "last query of the current page"

    def digest(self, pages: PageTensors) -> Tensor:
        rows = valid_rows(pages)[:, :, None, None]
        low = pages.k_NWKD.masked_fill(~rows, torch.inf).amin(1)
        high = pages.k_NWKD.masked_fill(~rows, -torch.inf).amax(1)
        return torch.stack([low, high], 1).flatten(1)

    def probe(self, pages: PageTensors) -> Tensor:
        last = pages.lengths - 1
        q_NHD = pages.q_NWHD[torch.arange(len(last), device=last.device), last]
        N, H, D = q_NHD.shape
        K = pages.k_NWKD.shape[2]
        q_NKGD = q_NHD.to(torch.promote_types(q_NHD.dtype, torch.float32)).reshape(N, K, H // K, D)
        return torch.stack([q_NKGD.clamp(max=0).sum(2), q_NKGD.clamp(min=0).sum(2)], 1).flatten(1)

    def score(self, probe_NF: Tensor, digest_PE: Tensor) -> Tensor:
        return probe_NF @ digest_PE.to(probe_NF.dtype).T
