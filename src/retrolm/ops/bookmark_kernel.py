"""Attention of bookmarks in one launch: the Triton kernel of `engine.bookmark_attention`.

A program serves the query heads of one KV head of one bookmark. Keys stand at adjacent positions, so that a key's place
in the row [sink | own page | bookmark] is its position. Imported only where Triton is installed.
Shape letters: n bookmarks, S sink tokens, Q places in the own page, H query heads, K KV heads, G = H // K, D head dim.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 32  # keys at a time


@triton.jit
def _rows(sink, own, mark, at, num_sink, length, sink_step, own_step, dims, D: tl.constexpr):
    """Some dims of the rows `at` of [sink | own page | bookmark], [TILE, dims]."""
    wide = (dims < D)[None, :]
    inside = at - num_sink
    first = (at < num_sink)[:, None] & wide
    second = ((inside >= 0) & (inside < length))[:, None] & wide
    third = (inside == length)[:, None] & wide
    x = tl.load(sink + at[:, None] * sink_step + dims[None, :], mask=first, other=0.0)
    y = tl.load(own + inside[:, None] * own_step + dims[None, :], mask=second, other=0.0)
    z = tl.load(mark + inside[:, None] * 0 + dims[None, :], mask=third, other=0.0)
    return tl.where(first, x, tl.where(second, y, z))


@triton.jit
def _turned(left, right, c, s):
    """Both halves of rotated vectors, rounded as `rotary.rotate` does."""
    kind = left.dtype
    a, b = left.to(tl.float32), right.to(tl.float32)
    first = tl.fma(-b, s, (a * c).to(kind).to(tl.float32)).to(kind)
    second = tl.fma(a, s, (b * c).to(kind).to(tl.float32)).to(kind)
    return first, second


@triton.jit
def _weighed(weight, value):
    """Product of float32 weights with values: in half precision as two products, of what is rounded and of the rest."""
    if value.dtype == tl.float32:
        return tl.dot(weight, value, input_precision="ieee")
    rounded = weight.to(value.dtype)
    rest = (weight - rounded.to(tl.float32)).to(value.dtype)
    return tl.dot(rounded, value) + tl.dot(rest, value)


@triton.jit(do_not_specialize=["num_sink"])
def _attend(
    q, k, v, own_k, own_v, lengths, sink_k, sink_v, is_sink, cos, sin, out, num_sink, scale, softcap,
    q0, q1, k0, k1, v0, v1, ok0, ok1, ok2, ov0, ov1, ov2, sk0, sk1, sk2, sv0, sv1, sv2, t0, num_kv_heads,
    G: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    page, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + page).to(tl.int32)
    num_sink = tl.where(tl.load(is_sink + page) != 0, 0, num_sink)
    own_k += page * ok0 + group * ok2
    own_v += page * ov0 + group * ov2
    sink_k += page * sk0 + group * sk2
    sink_v += page * sv0 + group * sv2
    mark_k, mark_v = k + page * k0 + group * k1, v + page * v0 + group * v1
    kind = q.dtype.element_ty
    heads = tl.arange(0, 16)
    low, dims = tl.arange(0, HALF_BLOCK), tl.arange(0, D_BLOCK)
    last = num_sink + length
    query = (q + page * q0 + (group * G + heads) * q1)[:, None]
    is_head, is_low = (heads < G)[:, None], (low < HALF)[None, :]
    q_cos = tl.load(cos + last * t0 + low, mask=low < HALF, other=0.0).to(kind).to(tl.float32)[None, :]
    q_sin = tl.load(sin + last * t0 + low, mask=low < HALF, other=0.0).to(kind).to(tl.float32)[None, :]
    q_left = tl.load(query + low[None, :], mask=is_head & is_low, other=0.0)
    q_right = tl.load(query + HALF + low[None, :], mask=is_head & is_low, other=0.0)
    q_low, q_high = _turned(q_left, q_right, q_cos, q_sin)
    if REST_BLOCK > 0:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)
        q_rest = tl.load(query + rest[None, :], mask=is_head & (rest < D)[None, :], other=0.0)
    peak = tl.full([16], float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros([16], dtype=tl.float32)
    total = tl.zeros([16, D_BLOCK], dtype=tl.float32)
    for start in range(0, last + 1, TILE):
        at = start + tl.arange(0, TILE)
        there = at <= last
        angle, turns = at[:, None] * t0 + low[None, :], there[:, None] & is_low
        c = tl.load(cos + angle, mask=turns, other=0.0).to(kind).to(tl.float32)
        s = tl.load(sin + angle, mask=turns, other=0.0).to(kind).to(tl.float32)
        left = _rows(sink_k, own_k, mark_k, at, num_sink, length, sk1, ok1, low, HALF)
        right = _rows(sink_k + HALF, own_k + HALF, mark_k + HALF, at, num_sink, length, sk1, ok1, low, HALF)
        k_low, k_high = _turned(left, right, c, s)
        score = tl.dot(q_low, tl.trans(k_low), input_precision="ieee")
        score += tl.dot(q_high, tl.trans(k_high), input_precision="ieee")
        if REST_BLOCK > 0:
            further = _rows(sink_k, own_k, mark_k, at, num_sink, length, sk1, ok1, rest, D)
            score += tl.dot(q_rest, tl.trans(further), input_precision="ieee")
        score *= scale
        if SOFTCAP:
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        kept, weight = tl.exp(peak - higher), tl.exp(score - higher[:, None])
        value = _rows(sink_v, own_v, mark_v, at, num_sink, length, sv1, ov1, dims, D)
        total = total * kept[:, None] + _weighed(weight, value)
        weight_sum = weight_sum * kept + tl.sum(weight, 1)
        peak = higher
    target = (page * num_kv_heads * G + group * G + heads)[:, None] * D + dims[None, :]
    tl.store(out + target, (total / weight_sum[:, None]).to(kind), mask=is_head & (dims < D)[None, :])


def attend_bookmarks(
    q_nHD: Tensor, k_nKD: Tensor, v_nKD: Tensor, own_k_nQKD: Tensor, own_v_nQKD: Tensor, own_lengths_n: Tensor,
    sink_k_nSKD: Tensor, sink_v_nSKD: Tensor, is_sink_n: Tensor, cos: Tensor, sin: Tensor, scale: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """See `engine.bookmark_attention.attend_bookmarks`; `cos`, `sin`: of positions 0, 1, 2, …, [positions, R]."""
    (n, H, D), K = q_nHD.shape, k_nKD.shape[1]
    half, out = cos.shape[-1] // 2, torch.empty(n, H, D, dtype=q_nHD.dtype, device=q_nHD.device)
    with torch.cuda.device_of(q_nHD):
        _attend[(n, K)](
            q_nHD, k_nKD, v_nKD, own_k_nQKD, own_v_nQKD, own_lengths_n, sink_k_nSKD, sink_v_nSKD,
            is_sink_n.view(torch.int8), cos, sin, out, sink_k_nSKD.shape[1], scale, softcap or 1.0,
            *q_nHD.stride()[:2], *k_nKD.stride()[:2], *v_nKD.stride()[:2], *own_k_nQKD.stride()[:3],
            *own_v_nQKD.stride()[:3], *sink_k_nSKD.stride()[:3], *sink_v_nSKD.stride()[:3], cos.stride(0), K,
            G=H // K, D=D, D_BLOCK=max(16, triton.next_power_of_2(D)), HALF=half,
            HALF_BLOCK=max(16, triton.next_power_of_2(half)),
            REST_BLOCK=max(16, triton.next_power_of_2(D - 2 * half)) if 2 * half < D else 0,
            SOFTCAP=bool(softcap), TILE=_TILE, num_warps=4, num_stages=1,
        )  # fmt: skip
    return out
