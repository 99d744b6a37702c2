"""Pages into one row of keys and values, keys rotated on the way: the Triton kernel of `gather`.

Imported only where Triton is installed. Rows are (token, head) pairs of a page, which lie behind each other both in a
page and in the gathered row. Shape letters as in `gather`.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantise_kernel import _load

if TYPE_CHECKING:
    from .layout import PageLayout

_ROWS = 32  # (token, head) pairs per program
_KINDS = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


@triton.jit
def _stored(base, rows, dims, inside, D: tl.constexpr):
    """Numbers that are kept as they are."""
    return tl.load(base + rows[:, None] * D + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _quantised(
    first, second, half, zero, scale, start, rows, dims, inside,
    K: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """code * scale + zero in float32; places count float16 numbers for scales, bytes for codes."""
    first16 = first.to(tl.pointer_type(tl.float16))
    second16 = second.to(tl.pointer_type(tl.float16))
    if BY_CHANNEL:
        of = (rows % K)[:, None] * D + dims[None, :]
        low = _load(first16, second16, zero + of, half // 2, inside).to(tl.float32)
        step = _load(first16, second16, scale + of, half // 2, inside).to(tl.float32)
    else:
        there = tl.max(inside.to(tl.int32), 1) > 0
        low = _load(first16, second16, zero + rows, half // 2, there).to(tl.float32)[:, None]
        step = _load(first16, second16, scale + rows, half // 2, there).to(tl.float32)[:, None]
    packed: tl.constexpr = D * BITS // 8
    code = _load(first, second, start + rows[:, None] * packed + (dims % packed)[None, :], half, inside)
    if BITS == 4:
        code = tl.where((dims >= packed)[None, :], code >> 4, code & 15)
    return code.to(tl.float32) * step + low


@triton.jit
def _part(
    first, second, half, W, rows, dims, inside, KEYS: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, STORED: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Some dims of a page's keys or values, rounded as the store reads them."""
    if BITS == 16:
        found = _stored(first if KEYS else second, rows, dims, inside, D)
    elif KEYS:
        start = 4 * K * D + 4 * W * K
        found = _quantised(first, second, half, 0, K * D, start, rows, dims, inside, K, D, BITS, True)
    else:
        start = 4 * K * D + 4 * W * K + W * K * (D * BITS // 8)
        zero = 2 * K * D
        found = _quantised(first, second, half, zero, zero + W * K, start, rows, dims, inside, K, D, BITS, False)
    return found.to(STORED).to(OUT)


# A kernel is compiled for each kind of number it isn't told to take as any: these change from text to text.
@triton.jit(do_not_specialize=["num_pages", "picked_stride", "num_picked", "own_stride", "num_own", "start", "length"])
def _gather(
    table, picked, ids, own, cos, sin, keys, values,
    num_pages, picked_stride, num_picked, own_stride, num_own, start, length, table_stride, half, W,
    K: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, BITS: tl.constexpr, STORED: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    slots = num_picked + num_own
    sample, slot = tl.program_id(0).to(tl.int64) // slots, tl.program_id(0) % slots
    page = tl.load(own + sample * own_stride + tl.maximum(slot - num_picked, 0))
    if slot < num_picked:
        ordinal = tl.load(picked + sample * picked_stride + slot)
        if ordinal >= 0:
            page = tl.load(ids + ordinal)
    RECORD: tl.constexpr = STORED if BITS == 16 else tl.uint8
    first = tl.multiple_of(tl.load(table + page).to(tl.pointer_type(RECORD)), ALIGN)
    second = tl.multiple_of(tl.load(table + num_pages + page).to(tl.pointer_type(RECORD)), ALIGN)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = rows // K
    place = slot * W + token - start
    there = (token < W) & (place >= 0) & (place < length)
    target = ((sample * length + slot * W - start) * K + rows) * D
    dims = tl.arange(0, D_BLOCK)
    inside = there[:, None] & (dims < D)[None, :]
    value = _part(first, second, half, W, rows, dims, inside, False, K, D, BITS, STORED, OUT)
    tl.store(values + target[:, None] + dims[None, :], value, mask=inside)
    low = tl.arange(0, HALF_BLOCK)
    inside = there[:, None] & (low < HALF)[None, :]
    angle = (sample * table_stride + place * (2 * HALF))[:, None] + low[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0).to(WIDE)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(WIDE)
    left = _part(first, second, half, W, rows, low, inside, True, K, D, BITS, STORED, OUT).to(WIDE)
    right = _part(first, second, half, W, rows, low + HALF, inside, True, K, D, BITS, STORED, OUT).to(WIDE)
    # Written as fma, or compilers choose which product is rounded first, and quantised pages tell by a whole step.
    turned = tl.fma(-right, s, (left * c).to(OUT).to(WIDE))
    tl.store(keys + target[:, None] + low[None, :], turned.to(OUT), mask=inside)
    turned = tl.fma(left, s, (right * c).to(OUT).to(WIDE))
    tl.store(keys + target[:, None] + (low + HALF)[None, :], turned.to(OUT), mask=inside)
    if REST_BLOCK > 0:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)
        inside = there[:, None] & (rest < D)[None, :]
        passed = _part(first, second, half, W, rows, rest, inside, True, K, D, BITS, STORED, OUT)
        tl.store(keys + target[:, None] + rest[None, :], passed, mask=inside)


def gather_rotated(
    table: Tensor,
    picked_nS: Tensor,
    ids_P: Tensor,
    own_nO: Tensor,
    layout: PageLayout,
    span: slice,
    cos: Tensor,
    sin: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `gather.gather_rotated`."""
    W, K, D = layout.page_shape
    (n, num_own), num_picked = own_nO.shape, picked_nS.shape[1]
    rotary_dims, length = cos.shape[-1], span.stop - span.start
    keys, values = (torch.empty(n, length, K, D, dtype=dtype, device=table.device) for _ in range(2))
    cos, sin = cos.contiguous(), sin.contiguous()
    half = layout.page_bytes // 2
    with torch.cuda.device_of(table):
        _gather[(n * (num_picked + num_own), triton.cdiv(W * K, _ROWS))](
            table, picked_nS, ids_P, own_nO, cos, sin, keys, values,
            table.shape[1], picked_nS.stride(0), num_picked, own_nO.stride(0), num_own, span.start, length,
            cos.stride(0) if len(cos) > 1 else 0, half, W,
            K=K, D=D, D_BLOCK=triton.next_power_of_2(D), HALF=rotary_dims // 2,
            HALF_BLOCK=triton.next_power_of_2(rotary_dims // 2),
            REST_BLOCK=triton.next_power_of_2(D - rotary_dims) if rotary_dims < D else 0,
            BITS=layout.bits, STORED=_KINDS[layout.dtype], OUT=_KINDS[dtype],
            WIDE=tl.float64 if dtype == torch.float64 else tl.float32,
            ALIGN=16 if half % 16 == 0 else layout.stored_dtype.itemsize * (2 if layout.bits < 16 else 1),
            ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    return keys, values
