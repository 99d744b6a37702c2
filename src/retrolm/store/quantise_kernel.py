"""Quantised records to keys and values in one pass over memory; imported only where Triton is installed."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 32  # tokens per program


@triton.jit
def _load(first, second, place, half, mask):
    """What stands at `place` of records that are kept in two halves of `half` elements."""
    left = tl.load(first + place, mask=mask & (place < half), other=0)
    right = tl.load(second + place - half, mask=mask & (place >= half), other=0)
    return tl.where(place < half, left, right)


@triton.jit
def _dequantise(
    first, second, keys, values, half, W, K,
    D: tl.constexpr, D_BLOCK: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    page, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = tl.program_id(2) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, D_BLOCK)
    there, wide = tokens < W, dims < D
    inside = there[:, None] & wide[None, :]
    first += page * half
    second += page * half
    first16 = first.to(tl.pointer_type(tl.float16))
    second16 = second.to(tl.pointer_type(tl.float16))
    channel = head * D + dims
    key_zero = _load(first16, second16, channel, half // 2, wide).to(tl.float32)
    key_scale = _load(first16, second16, K * D + channel, half // 2, wide).to(tl.float32)
    row = 2 * K * D + tokens * K + head
    value_zero = _load(first16, second16, row, half // 2, there).to(tl.float32)
    value_scale = _load(first16, second16, W * K + row, half // 2, there).to(tl.float32)
    packed: tl.constexpr = D * BITS // 8
    start = 4 * K * D + 4 * W * K
    code = start + (tokens[:, None] * K + head) * packed + (dims % packed)[None, :]
    key = _load(first, second, code, half, inside)
    value = _load(first, second, code + W * K * packed, half, inside)
    if BITS == 4:
        upper = (dims >= packed)[None, :]
        key = tl.where(upper, key >> 4, key & 15)
        value = tl.where(upper, value >> 4, value & 15)
    kind = keys.dtype.element_ty
    target = ((page * W + tokens[:, None]) * K + head) * D + dims[None, :]
    key = key.to(tl.float32) * key_scale[None, :] + key_zero[None, :]
    value = value.to(tl.float32) * value_scale[:, None] + value_zero[:, None]
    tl.store(keys + target, key.to(kind), mask=inside)
    tl.store(values + target, value.to(kind), mask=inside)


def dequantise_records(
    first: Tensor, second: Tensor, page_shape: tuple[int, int, int], bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `quantise.dequantise`; a half must be a multiple of 2 bytes."""
    W, K, D = page_shape
    keys, values = torch.empty(2, len(first), *page_shape, dtype=dtype, device=first.device)
    grid = (len(first), K, triton.cdiv(W, _TILE))
    with torch.cuda.device(first.device):
        _dequantise[grid](
            first.contiguous(), second.contiguous(), keys, values, first.shape[1], W, K,
            D=D, D_BLOCK=triton.next_power_of_2(D), BITS=bits, TILE=_TILE, num_warps=4,
        )  # fmt: skip
    return keys, values
