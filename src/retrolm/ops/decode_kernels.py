"""Triton kernels behind `decode_layer`: few launches per layer, every byte of weights and cache read once.

Imported only where Triton is installed. Shape letters as in `decode_layer`; G = H // K query heads per KV head,
S splits of the cache that different programs attend.
"""

# mypy: disallow-untyped-defs=False
# (Triton functions take pointers and constants; annotating them would change what they compile to.)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # outputs per program of a matrix-vector product
COLUMNS = 1024  # inputs it reads at a time
TILE = 32  # cache places that attention reads at a time
PROGRAMS = 256  # programs that attention spreads a batch over, about two per multiprocessor


# --- norm -------------------------------------------------------------------------------------------------------


@triton.jit
def _rms_norm(x, weight, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    scale = tl.load(weight + at, mask=inside, other=0.0)
    rounded = value.to(scale.dtype).to(tl.float32)
    tl.store(out + row * width + at, (rounded * scale.to(tl.float32)).to(scale.dtype), mask=inside)


def rms_norm(x_BE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """See `decode_layer.rms_norm`."""
    x_BE = x_BE.contiguous()
    out, width = torch.empty_like(x_BE), x_BE.shape[-1]
    block = triton.next_power_of_2(width)
    warps = max(1, min(8, block // 512))
    _rms_norm[(x_BE.numel() // width,)](x_BE, weight_E, out, width, eps, BLOCK=block, num_warps=warps)
    return out


# --- matrix-vector products -------------------------------------------------------------------------------------


@triton.jit
def _dot_rows(x, weight, row, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Dot products of `ROWS` rows of `weight`, from `row` on, with `x`; float32 [ROWS]."""
    rows = row + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < width
        part = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
        places = rows.to(tl.int64)[:, None] * width + columns[None, :]
        tile = tl.load(weight + places, mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0)
        total += tile.to(tl.float32) * part[None, :]
    return tl.sum(total, 1)


@triton.jit
def _project_row(
    x, weight0, weight1, weight2, bias0, bias1, bias2, residual, out, num0, num1, num2, width,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(num0, ROWS)
    tiles1 = tl.cdiv(num1, ROWS)
    offsets = tl.arange(0, ROWS)
    if tile < tiles0:
        row = tile * ROWS
        found = _dot_rows(x, weight0, row, num0, width, ROWS, COLUMNS)
        if BIAS0:
            found += tl.load(bias0 + row + offsets, mask=row + offsets < num0, other=0.0).to(tl.float32)
        place = row
        num_rows = num0
    elif tile < tiles0 + tiles1:
        row = (tile - tiles0) * ROWS
        found = _dot_rows(x, weight1, row, num1, width, ROWS, COLUMNS)
        if BIAS1:
            found += tl.load(bias1 + row + offsets, mask=row + offsets < num1, other=0.0).to(tl.float32)
        place = num0 + row
        num_rows = num0 + num1
    else:
        row = (tile - tiles0 - tiles1) * ROWS
        found = _dot_rows(x, weight2, row, num2, width, ROWS, COLUMNS)
        if BIAS2:
            found += tl.load(bias2 + row + offsets, mask=row + offsets < num2, other=0.0).to(tl.float32)
        place = num0 + num1 + row
        num_rows = num0 + num1 + num2
    places = place + offsets
    inside = places < num_rows
    if RESIDUAL:
        rounded = found.to(out.dtype.element_ty).to(tl.float32)
        found = rounded + tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, found.to(out.dtype.element_ty), mask=inside)


def project_row(
    x_1E: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual_1N: Tensor | None
) -> Tensor:
    """`decode_layer.project` for one row and at most three weights."""
    sizes = [len(weight) for weight in weights] + [0] * (3 - len(weights))
    filled = [*weights, *[weights[0]] * (3 - len(weights))]
    given = [*biases, *[None] * (3 - len(biases))]
    out = x_1E.new_empty(1, sum(sizes))
    grid = (sum(triton.cdiv(size, ROWS) for size in sizes),)
    _project_row[grid](
        x_1E, *filled, *(out if bias is None else bias for bias in given), out if residual_1N is None else residual_1N,
        out, *sizes, x_1E.shape[1], *(bias is not None for bias in given), residual_1N is not None,
        ROWS=ROWS, COLUMNS=_columns(x_1E.shape[1]), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _gated_row(x, gate, up, out, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    kind = out.dtype.element_ty
    left = _dot_rows(x, gate, row, num_rows, width, ROWS, COLUMNS).to(kind).to(tl.float32)
    right = _dot_rows(x, up, row, num_rows, width, ROWS, COLUMNS).to(kind).to(tl.float32)
    activated = (left / (1.0 + tl.exp(-left))).to(kind).to(tl.float32)
    rows = row + tl.arange(0, ROWS)
    tl.store(out + rows, (activated * right).to(kind), mask=rows < num_rows)


def gated_row(x_1E: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """`decode_layer.gated` for one row without biases."""
    num_rows, width = gate.shape
    out = x_1E.new_empty(1, num_rows)
    grid = (triton.cdiv(num_rows, ROWS),)
    _gated_row[grid](x_1E, gate, up, out, num_rows, width, ROWS=ROWS, COLUMNS=_columns(width), num_warps=4)
    return out


def _columns(width: int) -> int:
    return min(COLUMNS, triton.next_power_of_2(width))


# --- heads into the cache ---------------------------------------------------------------------------------------


@triton.jit
def _place_heads(
    qkv, cos, sin, q_out, keys, values, index, q_norm, k_norm, eps, num_heads, num_kv_heads, places,
    NORM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind = q_out.dtype.element_ty
    at = tl.arange(0, BLOCK)
    inside = at < HALF
    row = qkv + (sample * (num_heads + 2 * num_kv_heads) + head) * D
    first = tl.load(row + at, mask=inside, other=0.0)
    second = tl.load(row + HALF + at, mask=inside, other=0.0)
    is_query = head < num_heads
    kv_head = tl.where(head < num_heads + num_kv_heads, head - num_heads, head - num_heads - num_kv_heads)
    place = ((sample * num_kv_heads + kv_head) * places + tl.load(index)) * D
    if head >= num_heads + num_kv_heads:
        tl.store(values + place + at, first, mask=inside)
        tl.store(values + place + HALF + at, second, mask=inside)
    else:
        if NORM:
            weight = tl.where(is_query, tl.load(q_norm + at, mask=inside), tl.load(k_norm + at, mask=inside))
            further = tl.where(
                is_query, tl.load(q_norm + HALF + at, mask=inside), tl.load(k_norm + HALF + at, mask=inside)
            )
            a, b = first.to(tl.float32), second.to(tl.float32)
            scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
            first = ((a * scale).to(kind).to(tl.float32) * weight.to(tl.float32)).to(kind)
            second = ((b * scale).to(kind).to(tl.float32) * further.to(tl.float32)).to(kind)
        c = tl.load(cos + sample * D + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + sample * D + at, mask=inside, other=0.0).to(tl.float32)
        a, b = first.to(tl.float32), second.to(tl.float32)
        left = ((a * c).to(kind).to(tl.float32) - (b * s).to(kind).to(tl.float32)).to(kind)
        right = ((b * c).to(kind).to(tl.float32) + (a * s).to(kind).to(tl.float32)).to(kind)
        if is_query:
            q_row = q_out + (sample * num_heads + head) * D
            tl.store(q_row + at, left, mask=inside)
            tl.store(q_row + HALF + at, right, mask=inside)
        else:
            tl.store(keys + place + at, left, mask=inside)
            tl.store(keys + place + HALF + at, right, mask=inside)


def place_heads(
    qkv_BN: Tensor,
    cos_BR: Tensor,
    sin_BR: Tensor,
    keys_BKCD: Tensor,
    values_BKCD: Tensor,
    index: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """See `decode_layer.place_heads`; all dims are rotary."""
    B, K, C, D = keys_BKCD.shape
    H = qkv_BN.shape[1] // D - 2 * K
    q_out = qkv_BN.new_empty(B, H, D)
    _place_heads[(B, H + 2 * K)](
        qkv_BN.contiguous(), cos_BR.contiguous(), sin_BR.contiguous(), q_out, keys_BKCD, values_BKCD, index,
        *(norms or (qkv_BN, qkv_BN)), eps, H, K, C,
        NORM=norms is not None, D=D, HALF=D // 2, BLOCK=triton.next_power_of_2(D // 2), num_warps=1,
    )  # fmt: skip
    return q_out


# --- attention --------------------------------------------------------------------------------------------------


@triton.jit
def _attend_split(
    q, keys, values, starts, index, totals, maxima, sums, scale, softcap, window, num_kv_heads, places,
    G: tl.constexpr, G_BLOCK: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.load(index)
    start = tl.load(starts + group // num_kv_heads)
    if WINDOW:
        start = tl.maximum(start, last - window + 1)
    share = tl.cdiv(tl.cdiv(last + 1 - start, SPLITS), TILE) * TILE
    begin = start + split * share
    stop = tl.minimum(begin + share, last + 1)
    heads = tl.arange(0, G_BLOCK)
    dims = tl.arange(0, D_BLOCK)
    q_inside = (heads < G)[:, None] & (dims < D)[None, :]
    q_tile = tl.load(q + (group * G + heads)[:, None] * D + dims[None, :], mask=q_inside, other=0.0)
    peak = tl.full([G_BLOCK], float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros([G_BLOCK], dtype=tl.float32)
    total = tl.zeros([G_BLOCK, D_BLOCK], dtype=tl.float32)
    for first in range(begin, stop, TILE):
        at = first + tl.arange(0, TILE)
        there = at < stop
        where = (group * places + at)[:, None] * D + dims[None, :]
        inside = there[:, None] & (dims < D)[None, :]
        k_tile = tl.load(keys + where, mask=inside, other=0.0)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        if SOFTCAP:
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        kept = tl.exp(peak - higher)
        weight = tl.exp(score - higher[:, None])
        v_tile = tl.load(values + where, mask=inside, other=0.0)
        total = total * kept[:, None] + tl.dot(weight.to(v_tile.dtype), v_tile, input_precision="ieee")
        weight_sum = weight_sum * kept + tl.sum(weight, 1)
        peak = higher
    rows = (group * G + heads) * SPLITS + split
    tl.store(totals + rows[:, None] * D + dims[None, :], total, mask=q_inside)
    tl.store(maxima + rows, peak, mask=heads < G)
    tl.store(sums + rows, weight_sum, mask=heads < G)


@triton.jit
def _join_splits(totals, maxima, sums, out, SPLITS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, D_BLOCK)
    peak = tl.load(maxima + row * SPLITS + splits)
    factor = tl.exp(peak - tl.max(peak, 0))
    weight_sum = tl.sum(tl.load(sums + row * SPLITS + splits) * factor, 0)
    places = (row * SPLITS + splits)[:, None] * D + dims[None, :]
    parts = tl.load(totals + places, mask=(dims < D)[None, :], other=0.0)
    joined = tl.sum(parts * factor[:, None], 0) / weight_sum
    tl.store(out + row * D + dims, joined.to(out.dtype.element_ty), mask=dims < D)


def attend_token(
    q_BHD: Tensor,
    keys_BKCD: Tensor,
    values_BKCD: Tensor,
    starts_B: Tensor,
    index: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """See `decode_layer.attend_token`: programs attend parts of the cache, a second kernel joins them."""
    B, H, D = q_BHD.shape
    K, C = keys_BKCD.shape[1:3]
    splits = _splits(B * K, C)
    totals = torch.empty(B, H, splits, D, dtype=torch.float32, device=q_BHD.device)
    maxima, sums = torch.empty(2, B, H, splits, dtype=torch.float32, device=q_BHD.device)
    d_block = max(16, triton.next_power_of_2(D))  # a tensor core's product takes no less
    _attend_split[(B * K, splits)](
        q_BHD.contiguous(), keys_BKCD, values_BKCD, starts_B, index, totals, maxima, sums,
        scale, softcap or 1.0, window or 0, K, C,
        G=H // K, G_BLOCK=max(16, triton.next_power_of_2(H // K)), D=D, D_BLOCK=d_block, TILE=TILE, SPLITS=splits,
        SOFTCAP=bool(softcap), WINDOW=window is not None, num_warps=4,
    )  # fmt: skip
    out = torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
    _join_splits[(B * H,)](totals, maxima, sums, out, SPLITS=splits, D=D, D_BLOCK=d_block, num_warps=4)
    return out


def _splits(num_groups: int, num_places: int) -> int:
    """A power of two that gives about `PROGRAMS` programs, but no split without a tile."""
    wanted = max(1, min(PROGRAMS // max(num_groups, 1), num_places // TILE))
    return int(triton.next_power_of_2(wanted + 1) // 2)
