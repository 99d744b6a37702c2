"""RoPE in one pass over memory: the Triton kernel of `rotary.rotate`; imported only where Triton is installed."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # vectors per program


@triton.jit(do_not_specialize=["num_rows", "B", "C"])  # which change from text to text; each kind compiles anew
def _rotate(
    x, cos, sin, out, num_rows, B, C, x0, x1, x2, o0, o1, o2, t0, t1, t2,
    D: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    a, b, c = rows // C // B, rows // C % B, rows % C
    source = (x + a * x0 + b * x1 + c * x2)[:, None]
    target = (out + a * o0 + b * o1 + c * o2)[:, None]
    angle = (a * t0 + b * t1 + c * t2)[:, None]
    kind = out.dtype.element_ty
    low = tl.arange(0, HALF_BLOCK)[None, :]
    inside = there[:, None] & (low < HALF)
    left = tl.load(source + low, mask=inside, other=0.0).to(WIDE)
    right = tl.load(source + HALF + low, mask=inside, other=0.0).to(WIDE)
    cosine = tl.load(cos + angle + low, mask=inside, other=0.0).to(kind).to(WIDE)
    sine = tl.load(sin + angle + low, mask=inside, other=0.0).to(kind).to(WIDE)
    # Written as fma, so that every kernel that rotates gives the same bits.
    low_turned = tl.fma(-right, sine, (left * cosine).to(kind).to(WIDE))
    high_turned = tl.fma(left, sine, (right * cosine).to(kind).to(WIDE))
    tl.store(target + low, low_turned.to(kind), mask=inside)
    tl.store(target + HALF + low, high_turned.to(kind), mask=inside)
    if REST_BLOCK > 0:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        inside = there[:, None] & (rest < D)
        tl.store(target + rest, tl.load(source + rest, mask=inside, other=0.0), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """See `rotary.rotate`; at most 4 dims, the last of stride 1. Rounds where that does."""
    *rows, dim = x.shape
    rotary_dims, lead = cos.shape[-1], (1,) * (3 - len(rows))
    shape = (*lead, *rows)
    places = [part.expand(*shape, part.shape[-1]) for part in (x, cos, sin, out)]
    if places[1].stride() != places[2].stride():
        places[1:3] = (part.contiguous() for part in places[1:3])
    num_rows = x.numel() // dim
    with torch.cuda.device_of(x):
        _rotate[(triton.cdiv(num_rows, _ROWS),)](
            *places, num_rows, shape[1], shape[2], *places[0].stride()[:3], *places[3].stride()[:3],
            *places[1].stride()[:3], D=dim, HALF=rotary_dims // 2,
            HALF_BLOCK=triton.next_power_of_2(rotary_dims // 2),
            REST_BLOCK=triton.next_power_of_2(dim - rotary_dims) if rotary_dims < dim else 0,
            WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32, ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    return out
