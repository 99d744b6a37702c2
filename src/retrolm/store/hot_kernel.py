"""Which pages stand on the device, worked out there: the Triton kernels of `hot_pages`, imported only where Triton is.

A page's place is what `slot_of` says: a slot's number, `ELSEWHERE` (where it was computed), or `AT_HOME` (in pinned
host memory alone). `table` and `home` hold addresses, int64 [2, pages], one row per half of a record; so does `slots`,
[2, slots]. Everything runs in the order of one stream.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_HOME, ELSEWHERE = -1, -2
_AT_HOME, _ELSEWHERE = tl.constexpr(AT_HOME), tl.constexpr(ELSEWHERE)
_LAST = tl.constexpr(2**62)  # behind the order of any slot
_BLOCK = 128
_WORDS = 1024  # of eight bytes, per step of a copy
_PROGRAMS = 32  # enough bytes under way to fill the bus, few enough multiprocessors


# Counts change from call to call: a kernel built for each kind of them would be built while somebody waits.
@triton.jit(do_not_specialize=["num", "num_pages"])
def _put(ids, num, table, slot_of, page_in, used, first, second, half, num_pages, BLOCK: tl.constexpr):
    """Pages stand behind each other from two addresses on; what held them is free."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    page = tl.load(ids + at, mask=inside, other=0)
    slot = tl.load(slot_of + page, mask=inside, other=-1)
    held = inside & (slot >= 0)
    tl.store(page_in + slot, -1, mask=held)
    tl.store(used + slot, 0, mask=held)
    tl.store(slot_of + page, _ELSEWHERE, mask=inside)
    tl.store(table + page, first + at.to(tl.int64) * half, mask=inside)
    tl.store(table + num_pages + page, second + at.to(tl.int64) * half, mask=inside)


@triton.jit(do_not_specialize=["num", "num_pages"])
def _send_home(ids, num, table, home, slot_of, num_pages, BLOCK: tl.constexpr):
    """Pages that stood elsewhere stand in host memory alone."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    page = tl.load(ids + at, mask=at < num, other=0)
    away = (at < num) & (tl.load(slot_of + page, mask=at < num, other=0) == _ELSEWHERE)
    tl.store(slot_of + page, _AT_HOME, mask=away)
    for part in range(2):
        there = part * num_pages + page
        tl.store(table + there, tl.load(home + there, mask=away, other=0), mask=away)


@triton.jit(do_not_specialize=["num", "clock"])
def _ask(
    wanted, ids, num, slot_of, used, asked, missing, counts, clock, BLOCK: tl.constexpr
):  # fmt: skip
    """Note that pages are used now; list each one that is in host memory alone, once.

    `counts`: pages missing in calls of even and of odd clocks, pages ever asked for, pages ever missing.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    page = tl.load(wanted + at, mask=inside, other=-1)
    inside &= page >= 0
    page = tl.load(ids + page, mask=inside, other=0)
    slot = tl.load(slot_of + page, mask=inside, other=_ELSEWHERE)
    tl.store(used + slot, clock, mask=slot >= 0)
    new = inside & (tl.atomic_xchg(asked + page, clock, mask=inside) != clock)
    absent = new & (slot == _AT_HOME)
    place = tl.atomic_add(counts + clock % 2 + tl.zeros_like(at), 1, mask=absent)
    tl.store(missing + place, page, mask=absent)
    tl.atomic_add(counts + 2, tl.sum(new.to(tl.int64), 0))
    tl.atomic_add(counts + 3, tl.sum(absent.to(tl.int64), 0))


@triton.jit(do_not_specialize=["clock", "num_slots"])
def _rank(used, order, counts, clock, num_slots, BLOCK: tl.constexpr):
    """The slots from the one used longest ago to the one used last; the next call's count begins at 0."""
    if tl.program_id(0) == 0:
        tl.store(counts + (clock + 1) % 2, 0)
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = mine < num_slots
    key = tl.load(used + mine, mask=inside, other=0) * num_slots + mine
    rank = tl.zeros_like(mine)
    for first in range(0, num_slots, BLOCK):
        other = first + tl.arange(0, BLOCK)
        there = other < num_slots
        other_key = tl.where(there, tl.load(used + other, mask=there, other=0) * num_slots + other, _LAST)
        rank += tl.sum((other_key[None, :] < key[:, None]).to(tl.int32), 1)
    tl.store(order + rank, mine, mask=inside)


@triton.jit(do_not_specialize=["most", "clock", "num_pages", "num_slots"])
def _assign(
    missing, counts, most, order, used, page_in, slot_of, table, home, slots, jobs, clock, num_pages, num_slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Give missing pages the slots used longest ago, none that is used now; `jobs`: what to copy where, 0 = nothing."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    listed = at < tl.minimum(tl.load(counts + clock % 2), most)
    fits = listed & (at < num_slots)
    page = tl.load(missing + at, mask=fits, other=0)
    slot = tl.load(order + at, mask=fits, other=0)
    fits &= tl.load(used + slot, mask=fits, other=0) < clock
    old = tl.load(page_in + slot, mask=fits, other=-1)
    evicts = fits & (old >= 0)
    tl.store(slot_of + old, _AT_HOME, mask=evicts)
    tl.store(page_in + slot, page, mask=fits)
    tl.store(slot_of + page, slot, mask=fits)
    tl.store(used + slot, clock, mask=fits)
    for part in range(2):
        before = part * num_pages + old
        tl.store(table + before, tl.load(home + before, mask=evicts, other=0), mask=evicts)
        source = tl.load(home + part * num_pages + page, mask=fits, other=0)
        target = tl.load(slots + part * num_slots + slot, mask=fits, other=0)
        tl.store(table + part * num_pages + page, target, mask=fits)
        tl.store(jobs + 2 * part * most + at, source, mask=listed)
        tl.store(jobs + (2 * part + 1) * most + at, target, mask=listed)


@triton.jit(do_not_specialize=["clock", "most"])
def _bring(jobs, counts, clock, most, words, blocks, BLOCK: tl.constexpr):
    num = tl.minimum(tl.load(counts + clock % 2), most) * 2 * blocks
    for job in range(tl.program_id(0), num, tl.num_programs(0)):
        item = job // blocks
        at = (job % blocks) * BLOCK + tl.arange(0, BLOCK)
        pair = jobs + (item % 2) * 2 * most + item // 2
        source = tl.load(pair).to(tl.pointer_type(tl.int64))
        target = tl.load(pair + most).to(tl.pointer_type(tl.int64))
        inside = (at < words) & (tl.load(pair) != 0)
        tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


def put(
    ids: Tensor, halves: tuple[Tensor, Tensor], table: Tensor, slot_of: Tensor, page_in: Tensor, used: Tensor
) -> None:
    """Say that pages `ids` [N] stand in `halves`, [N, …] each, contiguous."""
    first, second = halves
    with torch.cuda.device_of(table):
        _put[(triton.cdiv(len(ids), _BLOCK),)](
            ids, len(ids), table, slot_of, page_in, used, first.data_ptr(), second.data_ptr(),
            first[0].nbytes, table.shape[1], BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


def send_home(ids: Tensor, table: Tensor, home: Tensor, slot_of: Tensor) -> None:
    """Say that pages `ids` no longer stand where `put` said."""
    with torch.cuda.device_of(table):
        _send_home[(triton.cdiv(len(ids), _BLOCK),)](
            ids, len(ids), table, home, slot_of, table.shape[1], BLOCK=_BLOCK, num_warps=4
        )


def bring(
    picked: Tensor, ids_P: Tensor, table: Tensor, home: Tensor, slots: Tensor, slot_of: Tensor,
    page_in: Tensor, used: Tensor, asked: Tensor, counts: Tensor, clock: int, half: int,
) -> None:  # fmt: skip
    """Copy picked pages from host memory to the slots used longest ago, as many as there are slots not used now.

    Args:
        picked: ordinals, negative = none; contiguous. ids_P: which page each ordinal is.
        counts: int64 [4], see `_ask`. clock: one more than in the call before. half: bytes of half a record.
    """
    most, num_slots = picked.numel(), len(page_in)
    scratch = torch.empty(5 * most + num_slots, dtype=torch.int64, device=table.device)
    missing, jobs, order = scratch.split([most, 4 * most, num_slots])
    blocks = triton.cdiv(half // 8, _WORDS)
    with torch.cuda.device_of(table):
        _ask[(triton.cdiv(most, _BLOCK),)](
            picked, ids_P, most, slot_of, used, asked, missing, counts, clock, BLOCK=_BLOCK, num_warps=4
        )
        _rank[(triton.cdiv(num_slots, _BLOCK),)](used, order, counts, clock, num_slots, BLOCK=_BLOCK, num_warps=4)
        _assign[(triton.cdiv(most, _BLOCK),)](
            missing, counts, most, order, used, page_in, slot_of, table, home, slots, jobs, clock,
            table.shape[1], num_slots, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
        grid = (min(_PROGRAMS, 2 * most * blocks),)
        _bring[grid](jobs, counts, clock, most, half // 8, blocks, BLOCK=_WORDS, num_warps=8)
