"""The losses, of any number of layers at once: contrastive (paper eq 7; D15 b), to true attention, to each other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(scores_BP: Tensor, positive_BP: Tensor, negative_BP: Tensor, rivals_B: Tensor | None = None) -> Tensor:
    """Mean over positives p of -log[e^{s_p} / (e^{s_p} + Σ_negatives e^{s_n})], one number per sample.

    Args:
        scores_BP: float page scores, [..., B, P]. positive_BP, negative_BP: bool, disjoint; pages in neither are left
            out.
        rivals_B: log of what negatives that have no column here add to the sum (`rival_sum`), [..., B].

    Returns:
        [..., B]; 0 for a sample without positives.
    """
    others_B = scores_BP.masked_fill(~negative_BP, -torch.inf).logsumexp(-1)
    others_B = others_B if rivals_B is None else torch.logaddexp(others_B, rivals_B)
    # softplus(others - s) is the loss of one positive; a sample without negatives has others = -inf and loss 0.
    each_BP = F.softplus((others_B[..., None] - scores_BP).clamp(min=-1e4))
    return (each_BP * positive_BP).sum(-1) / positive_BP.sum(-1).clamp(min=1)


def rival_sum(scores_NM: Tensor, rival_NM: Tensor, weight: float) -> Tensor:
    """log(weight · Σ_rivals e^s), [..., N]; -inf where there is no rival.

    Args:
        scores_NM: of the pages of all texts, [..., N, M]. rival_NM: bool, those that count.
        weight: how many pages of the own text a page of another one stands for.
    """
    return scores_NM.masked_fill(~rival_NM, -torch.inf).logsumexp(-1) + math.log(weight)


def consensus(scores_LNP: Tensor, there_NP: Tensor) -> Tensor:
    """What all layers together make of the pages: softmax of their mean score, without gradient, [..., N, P].

    Args:
        scores_LNP: of all layers, [L, ..., N, P]. there_NP: bool, which pages there are.
    """
    return scores_LNP.detach().mean(0).masked_fill(~there_NP, -torch.inf).softmax(-1)


def attention_kl(scores_BP: Tensor, share_BP: Tensor, page_BP: Tensor) -> Tensor:
    """KL(share ‖ softmax of the scores) over the pages of a sample, one number per sample, [..., B].

    Args:
        scores_BP: float page scores, [..., B, P]. share_BP: true attention on each page, alike, adding up to 1 over a
            sample's pages. page_BP: bool, which pages there are (the rest is padding).
    """
    log_model = scores_BP.masked_fill(~page_BP, -torch.inf).log_softmax(-1).masked_fill(~page_BP, 0.0)
    return (torch.xlogy(share_BP, share_BP) - share_BP * log_model).sum(-1)
