"""Gathering pages so that gradients find their way back without atomics.

Many pages may select the same page. Its gradient is the sum over all of them; an inverse page index, written as a
matrix of zeros and ones, turns that sum into one matrix product: always in the same order, so runs repeat bit for bit.
Shape letters: P stored pages, n gathering pages, S slots, W page size, K KV heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather_pages(pages_PWKD: Tensor, picked_nS: Tensor) -> Tensor:
    """Read the selected pages of each page: [n, S*W, K, D], differentiable in `pages_PWKD`.

    Args:
        picked_nS: page indices, int64, all in 0..P-1.
    """
    gathered: Tensor = _Gather.apply(pages_PWKD, picked_nS)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pages_PWKD: Tensor, picked_nS: Tensor) -> Tensor:
        ctx.save_for_backward(picked_nS)
        ctx.shape = pages_PWKD.shape
        n, S = picked_nS.shape
        return pages_PWKD.index_select(0, picked_nS.flatten()).reshape(n, S * ctx.shape[1], *ctx.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (picked_nS,) = ctx.saved_tensors
        rows = grads[0].reshape(picked_nS.numel(), ctx.shape[1:].numel())
        pages = torch.arange(ctx.shape[0], device=rows.device)
        inverse = (pages[:, None] == picked_nS.flatten()).to(rows.dtype)
        return (inverse @ rows).reshape(ctx.shape), None
