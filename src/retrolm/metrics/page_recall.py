"""How often the evidence is among the best-scored pages."""

from __future__ import annotations

import torch
from torch import Tensor


def page_hits(scores_BP: Tensor, gold_BP: Tensor, allowed_BP: Tensor, num_pages: int) -> Tensor:
    """Whether any gold page is among the `num_pages` best allowed pages, bool [B]. Ties go to the later page.

    Args:
        scores_BP: float. gold_BP: bool. allowed_BP: bool, pages that compete (not forced ones, not padding).
    """
    P = scores_BP.shape[1]
    ranked = (
        scores_BP.double().masked_fill(~allowed_BP, -torch.inf).flip(1).argsort(dim=1, descending=True, stable=True)
    )
    best = (P - 1 - ranked)[:, :num_pages]
    usable = allowed_BP.gather(1, best)
    return (gold_BP.gather(1, best) & usable).any(1)
