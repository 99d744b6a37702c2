"""The Triton kernels of `prefill_layer`; imported only where Triton is installed."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # numbers per program of an elementwise kernel


@triton.jit
def _add_rms_norm(x, more, weight, out, width, eps, MORE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    kind = x.dtype.element_ty
    value = tl.load(x + start + at, mask=inside, other=0.0)
    if MORE:
        added = tl.load(more + start + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(kind)
        tl.store(x + start + at, value, mask=inside)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    scale = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + start + at, (wide.to(kind).to(tl.float32) * scale.to(tl.float32)).to(kind), mask=inside)


def add_rms_norm(x_TE: Tensor, more_TE: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
    """See `prefill_layer.add_rms_norm`."""
    out, width = torch.empty_like(x_TE), x_TE.shape[-1]
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x_TE):
        _add_rms_norm[(x_TE.numel() // width,)](
            x_TE, x_TE if more_TE is None else more_TE, weight_E, out, width, eps,
            MORE=more_TE is not None, BLOCK=block, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return out


@triton.jit
def _silu_times(gate, up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    kind = gate.dtype.element_ty
    value = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    active = (value / (1.0 + tl.exp(-value))).to(kind).to(tl.float32)
    further = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(gate + at, (active * further).to(kind), mask=inside)


def silu_times(gate_TN: Tensor, up_TN: Tensor) -> Tensor:
    """See `prefill_layer.silu_times`."""
    count = gate_TN.numel()
    with torch.cuda.device_of(gate_TN):
        _silu_times[(triton.cdiv(count, _BLOCK),)](gate_TN, up_TN, count, BLOCK=_BLOCK, num_warps=4)
    return gate_TN
