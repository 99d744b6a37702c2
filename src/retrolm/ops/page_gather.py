"""Gathering pages so that gradients find their way back without atomics.

Many pages may select the same page. Its gradient is the sum over all of them; an inverse page index, written as a
matrix of zeros and ones, turns that sum into one matrix product: always in the same order, so runs repeat bit for bit.
Shape letters: P stored pages, n gathering pages, S slots, W page size, L gathered tokens, K KV heads, D head dim, R
rotary dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rotary import rotate

WHOLE = slice(0, None)


def gather_pages(
    keys_PWKD: Tensor,
    values_PWKD: Tensor,
    picked_nS: Tensor,
    cos: Tensor,
    sin: Tensor,
    span: slice = WHOLE,
    last_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Read the selected pages of each page and rotate their keys: [n, L, K, D] each, differentiable.

    Args:
        picked_nS: page indices, int64, all in 0..P-1.
        cos, sin: of the gathered keys, broadcastable to [n, L, 1, R].
        span: which of the S*W gathered tokens are wanted.
        last_only: let gradients reach the pages in the last slot alone.
    """
    keys, values = _Gather.apply(keys_PWKD, values_PWKD, picked_nS, cos, sin, span, last_only)
    return keys, values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        values: Tensor,
        picked: Tensor,
        cos: Tensor,
        sin: Tensor,
        span: slice,
        last_only: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(picked, cos, sin)
        ctx.shape, ctx.span, ctx.last_only = keys.shape, span, last_only
        n, S = picked.shape
        keys, values = (
            x.index_select(0, picked.flatten()).view(n, S * x.shape[1], *x.shape[2:])[:, span] for x in (keys, values)
        )
        return rotate(keys, cos, sin), values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        picked, cos, sin = ctx.saved_tensors
        P, W = ctx.shape[:2]
        grad_keys, grad_values = rotate(grads[0], cos, -sin), grads[1]
        first, length = ctx.span.indices(picked.shape[1] * W)[0], grad_keys.shape[1]
        missing = (0, 0, 0, 0, first, picked.shape[1] * W - first - length)
        if any(missing):
            grad_keys, grad_values = (F.pad(x, missing) for x in (grad_keys, grad_values))
        if ctx.last_only:
            picked, grad_keys, grad_values = picked[:, -1:], grad_keys[:, -W:], grad_values[:, -W:]
        pages = torch.arange(P, device=picked.device)
        inverse = (pages[:, None] == picked.flatten()).to(grad_keys.dtype)
        found = [(inverse @ x.reshape(picked.numel(), -1)).view(ctx.shape) for x in (grad_keys, grad_values)]
        return found[0], found[1], None, None, None, None, None
