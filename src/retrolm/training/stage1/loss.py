"""The losses, of any number of layers at once: contrastive (paper eq 7; D15 b) and towards true attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(scores_BP: Tensor, positive_BP: Tensor, negative_BP: Tensor) -> Tensor:
    """Mean over positives p of -log[e^{s_p} / (e^{s_p} + Σ_negatives e^{s_n})], one number per sample.

    Args:
        scores_BP: float page scores, [..., B, P]. positive_BP, negative_BP: bool, disjoint; pages in neither are left
            out.

    Returns:
        [..., B]; 0 for a sample without positives.
    """
    others_B = scores_BP.masked_fill(~negative_BP, -torch.inf).logsumexp(-1)
    # softplus(others - s) is the loss of one positive; a sample without negatives has others = -inf and loss 0.
    each_BP = F.softplus((others_B[..., None] - scores_BP).clamp(min=-1e4))
    return (each_BP * positive_BP).sum(-1) / positive_BP.sum(-1).clamp(min=1)


def attention_kl(scores_BP: Tensor, share_BP: Tensor, page_BP: Tensor) -> Tensor:
    """KL(share ‖ softmax of the scores) over the pages of a sample, one number per sample, [..., B].

    Args:
        scores_BP: float page scores, [..., B, P]. share_BP: true attention on each page, alike, adding up to 1 over a
            sample's pages. page_BP: bool, which pages there are (the rest is padding).
    """
    log_model = scores_BP.masked_fill(~page_BP, -torch.inf).log_softmax(-1).masked_fill(~page_BP, 0.0)
    return (torch.xlogy(share_BP, share_BP) - share_BP * log_model).sum(-1)
