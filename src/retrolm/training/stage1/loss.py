"""The contrastive loss of one layer (paper eq 7, with several positives as in D15 b)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(scores_BP: Tensor, positive_BP: Tensor, negative_BP: Tensor) -> Tensor:
    """Mean over positives p of -log[e^{s_p} / (e^{s_p} + Σ_negatives e^{s_n})], one number per sample.

    Args:
        scores_BP: float page scores. positive_BP, negative_BP: bool, disjoint; pages in neither are left out.

    Returns:
        [B]; 0 for a sample without positives.
    """
    others_B = scores_BP.masked_fill(~negative_BP, -torch.inf).logsumexp(1)
    # softplus(others - s) is the loss of one positive; a sample without negatives has others = -inf and loss 0.
    each_BP = F.softplus((others_B[:, None] - scores_BP).clamp(min=-1e4))
    count_B = positive_BP.sum(1)
    return (each_BP * positive_BP).sum(1) / count_B.clamp(min=1)
