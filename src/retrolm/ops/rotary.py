"""Rotary position embedding, applied when a page is used rather than when it is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate the first `cos.shape[-1]` dims of `x` in the half-split convention; further dims pass through.

    Args:
        x: [..., D] queries or keys before RoPE.
        cos: broadcastable to [..., R], R ≤ D even, as the model's own rotary module returns it (both halves equal).
        sin: like `cos`.
        out: where to write, of the shape and dtype of `x`, in any layout; not with gradients.

    Returns:
        A new tensor of the shape and dtype of `x`, or `out`; differentiable in `x`.
    """
    if x.requires_grad and torch.is_grad_enabled():
        turned: Tensor = _Rotate.apply(x, cos, sin)
        return turned
    x = x.detach()
    rotary_dims = cos.shape[-1]
    half = rotary_dims // 2
    if _at_once(x, cos, out):
        from .rotary_kernel import rotate as rotate_at_once

        rotated: Tensor = rotate_at_once(x, cos, sin, torch.empty_like(x) if out is None else out)
        return rotated
    out = torch.empty_like(x) if out is None else out
    # Whole rows times cos, then a fused multiply-add for each half: on a CPU the fewer and longer passes, the better.
    torch.mul(x[..., :rotary_dims], cos.to(x.dtype), out=out[..., :rotary_dims])
    sin = sin[..., :half].to(x.dtype)
    out[..., :half].addcmul_(x[..., half:rotary_dims], sin, value=-1)
    out[..., half:rotary_dims].addcmul_(x[..., :half], sin)
    if rotary_dims < x.shape[-1]:
        out[..., rotary_dims:] = x[..., rotary_dims:]
    return out


def _at_once(x: Tensor, cos: Tensor, out: Tensor | None) -> bool:
    """Whether one kernel can do it."""
    fits = 1 < x.dim() <= 4 and all(part.stride(-1) == 1 for part in (x, cos, x if out is None else out))
    return fits and x.numel() > 0 and launch.runs_on(x)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, -sin), None, None


def unscaled(x: Tensor, scaling: float, rotary_dims: int) -> Tensor:
    """Undo what RoPE does at position 0: nothing, or a scale on the rotary dims of `x` [..., D] (yarn, longrope)."""
    if scaling == 1.0:
        return x
    return torch.cat([x[..., :rotary_dims] / scaling, x[..., rotary_dims:]], -1)
