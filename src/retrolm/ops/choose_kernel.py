"""From page scores to chosen pages in three launches: the Triton kernels of `methods.selection.choose_pages`.

Every page gets one whole number that orders pages as that function does, its index included, so that no two are alike
and any way to find the largest ones finds the same. Imported only where Triton is installed.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # pages per program
_NEVER = tl.constexpr(-(2**63))
_PINNED = tl.constexpr(2**31 - 1)  # above the order of any number, infinity included
_LOCAL = tl.constexpr(2**31 - 2)


@triton.jit(do_not_specialize=["P", "scores_stride", "num_sink", "num_local"])
def _rank(scores, past, pinned, keys, P, scores_stride, num_sink, num_local, PINNED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = page < P
    score = tl.load(scores + row * scores_stride + page, mask=inside, other=0.0)
    num_past = tl.load(past + row)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as whole numbers, these are ordered as the scores are
    order = tl.where(page >= num_past - num_local, _LOCAL, order)
    usable = (score > float("-inf")) | (page >= num_past - num_local)
    if PINNED:
        always = tl.load(pinned + page, mask=inside, other=0) != 0
        order = tl.where(always, _PINNED, order)
        usable |= always
    usable &= (page < num_past) & (page >= num_sink)
    key = order.to(tl.int64) * 4294967296 + page
    tl.store(keys + row * P + page, tl.where(usable, key, _NEVER), mask=inside)


@triton.jit(do_not_specialize=["width", "num_sinks"])
def _in_order(best, past, room, out, width, num_sinks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    rank = slot - num_sinks
    is_best = (rank >= 0) & (rank < width)
    key = tl.load(best + row * width + rank, mask=is_best, other=_NEVER)
    usable = (key != _NEVER) & (rank < tl.load(room + row))
    chosen = tl.where(usable, (key & 0xFFFFFFFF).to(tl.int32), -1)
    sink = tl.where(slot < tl.load(past + row), slot, -1)
    found = tl.where(is_best, chosen, tl.where(slot < num_sinks, sink, 2147483647))
    found = tl.sort(found)  # the places behind all slots stay behind
    tl.store(out + row * (num_sinks + width) + slot, found.to(tl.int64), mask=slot < num_sinks + width)


def choose(
    scores_NP: Tensor, past_N: Tensor, room_N: Tensor, width: int, num_sink: int, num_sinks: int, num_local: int,
    pinned_P: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `methods.selection.choose_pages`; `width` pages besides the `num_sinks` sinks, scores in float32."""
    N, P = scores_NP.shape
    keys = torch.empty(N, P, dtype=torch.int64, device=scores_NP.device)
    out = torch.empty(N, num_sinks + width, dtype=torch.int64, device=scores_NP.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(scores_NP):
        _rank[(N, triton.cdiv(P, _BLOCK))](
            scores_NP, past_N, keys if pinned_P is None else pinned_P.to(torch.int8), keys,
            P, scores_NP.stride(0), num_sink, num_local, PINNED=pinned_P is not None, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
        best = keys.topk(width, 1).values
        block = triton.next_power_of_2(num_sinks + width)
        _in_order[(N,)](best, past_N, room_N, out, width, num_sinks, BLOCK=block, num_warps=1 if block <= 128 else 4)
    return out
