"""Attention that also tells the log-sum-exp of its logits, so that it can be joined with attention to other keys.

Shape letters: B samples, H query heads, K KV heads, Q queries, T keys, D head dim.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .attention import CPU_KERNEL, SPLIT_DTYPES


def gives_lse(q_BHQD: Tensor) -> bool:
    """Whether `attend_lse` works there: a fused kernel for this device, dtype and head size."""
    if q_BHQD.device.type == "cpu":
        return CPU_KERNEL is not None and q_BHQD.dtype in SPLIT_DTYPES
    head_dim = q_BHQD.shape[-1]
    fits = q_BHQD.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    return q_BHQD.is_cuda and fits and _has_flash(q_BHQD.device)


def attend_lse(q_BHQD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention to all keys, or to those that are not later; without gradients, where `gives_lse`.

    Args:
        causal: query i sees keys up to i.

    Returns:
        [B, H, Q, D], and the log-sum-exp [B, H, Q] in float32 or wider.
    """
    if q_BHQD.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q_BHQD, k_BKTD, v_BKTD, 0.0, causal, scale=scale)
    else:
        found = CPU_KERNEL(q_BHQD, k_BKTD, v_BKTD, 0.0, causal, scale=scale)
    return found[0], found[1]


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)
