"""Triton kernels behind `paged_attention`: pages are read where they lie, and counted on the way.

Imported only where Triton is installed. Shape letters as in `paged_attention`; R = G * Q rows of one KV head.
"""

# mypy: disallow-untyped-defs=False
# (Triton functions take pointers and constants; annotating them would change what they compile to.)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .paged_attention import PagesToRead, Tally

TILE = 32  # places that attention reads at a time
PROGRAMS = 256  # programs that attention spreads a batch over, about two per multiprocessor
PAGES = 32  # pages whose bounds a program computes


@triton.jit
def _attend_split(
    q, keys, values, pages, after, until, true, totals, maxima, sums, counts, scale, softcap, num_read, num_pages,
    K: tl.constexpr, J: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, R_BLOCK: tl.constexpr, D: tl.constexpr,
    D_BLOCK: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, SOFTCAP: tl.constexpr,
    LISTED: tl.constexpr, AFTER: tl.constexpr, UNTIL: tl.constexpr,
):  # fmt: skip
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sample = group // K
    listed = (sample * J + (group % K if J > 1 else 0)) * num_read
    stop = num_read * W
    if not LISTED:
        stop = (tl.load(true + sample * Q + Q - 1) + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(stop, SPLITS), TILE) * TILE
    begin = split * share
    stop = tl.minimum(begin + share, stop)
    rows = tl.arange(0, R_BLOCK)
    dims = tl.arange(0, D_BLOCK)
    inside_q = (rows < R)[:, None] & (dims < D)[None, :]
    q_tile = tl.load(q + (group * R + rows)[:, None] * D + dims[None, :], mask=inside_q, other=0.0)
    own = tl.load(true + sample * Q + rows % Q, mask=rows < R, other=-1)
    peak = tl.full([R_BLOCK], float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros([R_BLOCK], dtype=tl.float32)
    count = tl.zeros([R_BLOCK], dtype=tl.int32)
    total = tl.zeros([R_BLOCK, D_BLOCK], dtype=tl.float32)
    for first in range(begin, stop, TILE):
        at = first + tl.arange(0, TILE)
        there = at < stop
        page = (at // W).to(tl.int64)
        if LISTED:
            page = tl.load(pages + listed + at // W, mask=there, other=0)
        place = page * W + at % W
        seen = there[None, :] & (place[None, :] <= own[:, None])
        if AFTER:
            seen = seen & (tl.load(after + listed + at // W, mask=there, other=0)[None, :] < own[:, None])
        if UNTIL:
            seen = seen & (tl.load(until + listed + at // W, mask=there, other=0)[None, :] >= own[:, None])
        where = (group * num_pages * W + place)[:, None] * D + dims[None, :]
        inside = there[:, None] & (dims < D)[None, :]
        k_tile = tl.load(keys + where, mask=inside, other=0.0)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        if SOFTCAP:
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp(peak - finite)
        weight = tl.exp(score - finite[:, None])
        v_tile = tl.load(values + where, mask=inside, other=0.0)
        total = total * kept[:, None] + tl.dot(weight.to(v_tile.dtype), v_tile, input_precision="ieee")
        weight_sum = weight_sum * kept + tl.sum(weight, 1)
        count += tl.sum(seen.to(tl.int32), 1)
        peak = higher
    out = (group * R + rows) * SPLITS + split
    tl.store(totals + out[:, None] * D + dims[None, :], total, mask=inside_q)
    tl.store(maxima + out, peak, mask=rows < R)
    tl.store(sums + out, weight_sum, mask=rows < R)
    tl.store(counts + out, count, mask=rows < R)


@triton.jit
def _join_splits(
    totals, maxima, sums, counts, out, lse, all_sums, most, step, rows_per_sample, num_samples,
    SPLITS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, D_BLOCK)
    peak = tl.load(maxima + row * SPLITS + splits)
    top = tl.max(peak, 0)
    factor = tl.exp(peak - tl.where(top == float("-inf"), 0.0, top))
    weight_sum = tl.sum(tl.load(sums + row * SPLITS + splits) * factor, 0)
    places = (row * SPLITS + splits)[:, None] * D + dims[None, :]
    parts = tl.load(totals + places, mask=(dims < D)[None, :], other=0.0)
    joined = tl.sum(parts * factor[:, None], 0) / tl.where(weight_sum > 0, weight_sum, 1.0)
    tl.store(out + row * D + dims, joined, mask=dims < D)
    tl.store(lse + row, tl.where(weight_sum > 0, top + tl.log(weight_sum), float("-inf")))
    count = tl.sum(tl.load(counts + row * SPLITS + splits), 0)
    tl.store(all_sums + row, tl.load(all_sums + row) + count)
    tl.atomic_max(most + tl.load(step) * num_samples + row // rows_per_sample, count)


def attend_pages(
    q_BHQD: Tensor,
    keys_BKPWD: Tensor,
    values_BKPWD: Tensor,
    read: PagesToRead,
    true_BQ: Tensor,
    tally: Tally,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See `paged_attention.attend_pages`: programs attend parts of the pages, a second kernel joins them."""
    B, H, Q, D = q_BHQD.shape
    K, P, W = keys_BKPWD.shape[1:4]
    pages = read.pages_BJn
    num_read = P if pages is None else pages.shape[2]
    splits, d_block = _splits(B * K, num_read * W), max(16, triton.next_power_of_2(D))
    totals = torch.empty(B, H, Q, splits, D, dtype=torch.float32, device=q_BHQD.device)
    maxima, sums = torch.empty(2, B, H, Q, splits, dtype=torch.float32, device=q_BHQD.device)
    counts = torch.empty(B, H, Q, splits, dtype=torch.int32, device=q_BHQD.device)
    lists = [true_BQ if x is None else x.contiguous() for x in (pages, read.after_BJn, read.until_BJn)]
    rows = H // K * Q
    _attend_split[(B * K, splits)](
        q_BHQD.contiguous(), keys_BKPWD, values_BKPWD, *lists, true_BQ.contiguous(), totals, maxima, sums, counts,
        scale, softcap or 1.0, num_read, P,
        K=K, J=1 if pages is None else pages.shape[1], Q=Q, R=rows, R_BLOCK=max(16, triton.next_power_of_2(rows)),
        D=D, D_BLOCK=d_block, W=W, TILE=TILE, SPLITS=splits, SOFTCAP=bool(softcap), LISTED=pages is not None,
        AFTER=read.after_BJn is not None, UNTIL=read.until_BJn is not None, num_warps=4,
    )  # fmt: skip
    out = torch.empty(B, H, Q, D, dtype=torch.float32, device=q_BHQD.device)
    lse = torch.empty(B, H, Q, dtype=torch.float32, device=q_BHQD.device)
    _join_splits[(B * H * Q,)](
        totals, maxima, sums, counts, out, lse, tally.sums_BHQ, tally.most_SB, tally.step, H * Q, B,
        SPLITS=splits, D=D, D_BLOCK=d_block, num_warps=4,
    )  # fmt: skip
    return out, lse


def _splits(num_groups: int, num_places: int) -> int:
    """A power of two that gives about `PROGRAMS` programs, but no split without a tile."""
    wanted = max(1, min(PROGRAMS // max(num_groups, 1), num_places // TILE))
    return int(triton.next_power_of_2(wanted + 1) // 2)


@triton.jit
def _merge_shifted(
    old_out, old_lse, out, lse, merged, Q: tl.constexpr, Q_BLOCK: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, Q_BLOCK)
    dims = tl.arange(0, D_BLOCK)
    places = (head * Q + rows)[:, None] * D + dims[None, :]
    inside = (rows < Q)[:, None] & (dims < D)[None, :]
    before = (rows < Q - 1)[:, None] & (dims < D)[None, :]
    a = tl.load(old_lse + head * Q + rows + 1, mask=rows < Q - 1, other=float("-inf"))
    b = tl.load(lse + head * Q + rows, mask=rows < Q, other=float("-inf"))
    a_out = tl.load(old_out + places + D, mask=before, other=0.0)
    b_out = tl.load(out + places, mask=inside, other=0.0)
    top = tl.maximum(a, b)
    finite = tl.where(top == float("-inf"), 0.0, top)
    a_weight, b_weight = tl.exp(a - finite), tl.exp(b - finite)
    both = a_weight + b_weight
    joined = (a_weight[:, None] * a_out + b_weight[:, None] * b_out) / tl.where(both > 0, both, 1.0)[:, None]
    tl.debug_barrier()  # all old rows are read before any is overwritten
    tl.store(merged + places, joined, mask=inside)
    tl.store(old_out + places, joined, mask=inside)
    tl.store(old_lse + head * Q + rows, tl.where(both > 0, finite + tl.log(both), float("-inf")), mask=rows < Q)


def merge_shifted(old_BHQD: Tensor, old_lse_BHQ: Tensor, out_BHQD: Tensor, lse_BHQ: Tensor) -> Tensor:
    """See `paged_attention.merge_shifted`; one warp holds all rows of a head, so that none is lost."""
    B, H, Q, D = out_BHQD.shape
    merged = torch.empty_like(out_BHQD)
    _merge_shifted[(B * H,)](
        old_BHQD, old_lse_BHQ, out_BHQD, lse_BHQ, merged,
        Q=Q, Q_BLOCK=triton.next_power_of_2(Q), D=D, D_BLOCK=triton.next_power_of_2(D), num_warps=1,
    )  # fmt: skip
    return merged


@triton.jit
def _page_bounds(
    q, low, high, out, num_pages, G: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, PAGES: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    dims = tl.arange(0, D_BLOCK)
    places = (group * num_pages + page)[:, None] * D + dims[None, :]
    inside = (page < num_pages)[:, None] & (dims < D)[None, :]
    a = tl.load(low + places, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(high + places, mask=inside, other=0.0).to(tl.float32)
    for head in range(G):
        row = group * G + head
        query = tl.load(q + row * D + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
        found = tl.sum(tl.maximum(query * a, query * b), 1)
        tl.store(out + row * num_pages + page, found, mask=page < num_pages)


def page_bounds(query_BKGD: Tensor, low_BKPD: Tensor, high_BKPD: Tensor) -> Tensor:
    """See `paged_attention.page_bounds`; `low` is nowhere above `high`."""
    B, K, G, D = query_BKGD.shape
    P = low_BKPD.shape[2]
    out = torch.empty(B, K, G, P, dtype=torch.float32, device=query_BKGD.device)
    _page_bounds[(B * K, triton.cdiv(P, PAGES))](
        query_BKGD.contiguous(), low_BKPD.contiguous(), high_BKPD.contiguous(), out, P,
        G=G, D=D, D_BLOCK=triton.next_power_of_2(D), PAGES=PAGES, num_warps=4,
    )  # fmt: skip
    return out
