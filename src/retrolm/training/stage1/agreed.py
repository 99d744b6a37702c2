"""What the last layers and a question's words agree on, as the engine has it (`agreement`), differentiable and batched.

Shape letters: L layers, K KV heads that choose by themselves (or 1), N questions, P text pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_SPREAD = 1e-5  # where all pages tie there is nothing to standardise


def agreed_scores(scores_LKNP: Tensor, words_NP: Tensor | None, free_NP: Tensor, word_weight: float) -> Tensor:
    """Mean of the layers' scores, each standardised over the free pages, and `word_weight` times the words', [N, P].

    Args:
        scores_LKNP: of the layers that have a say. words_NP: how well words match, float; None = they don't count.
        free_NP: bool, the pages that compete.
    """
    agreed_NP = _standardised(scores_LKNP, free_NP).mean((0, 1))
    if words_NP is None:
        return agreed_NP
    return agreed_NP + word_weight * _standardised(words_NP.to(agreed_NP.dtype), free_NP)


def _standardised(scores_NP: Tensor, free_NP: Tensor) -> Tensor:
    """Scores less the mean over the free pages, by their standard deviation, [..., N, P]."""
    count = free_NP.sum(-1, keepdim=True).clamp(min=1)
    apart = scores_NP - torch.where(free_NP, scores_NP, 0).sum(-1, keepdim=True) / count
    variance = torch.where(free_NP, apart, 0).square().sum(-1, keepdim=True) / count
    return apart / (variance + _LEAST_SPREAD**2).sqrt()
