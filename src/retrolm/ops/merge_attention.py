"""Attention over two disjoint sets of keys, made one by the log-sum-exp of their logits."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets, from that over each.

    Args:
        out_a, out_b: attention outputs [..., D]; finite, whatever they are where a set is empty.
        lse_a, lse_b: log of the sum of exponentials of the logits [...]; -inf where a set is empty.

    Returns:
        Output [..., D] (zeros where both are empty) and log-sum-exp [...].
    """
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse).nan_to_num(0.0)[..., None] for x in (lse_a, lse_b))
    return weight_a * out_a + weight_b * out_b, lse
