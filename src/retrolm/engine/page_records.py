"""Fresh keys and values of a group as the records that a page store keeps.

Shape letters: n pages of a group, Q rows of each, O own slots, W page size, K KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..store import PageStore
from .chunk import PageGroup


def write_pages(store: PageStore, layer: int, group: PageGroup, k_nQKD: Tensor, v_nQKD: Tensor) -> None:
    """Store a group's keys and values; rows behind short pages must be zero.

    Sink pages stand at the right of their room, so they are written apart: all others are records as they come.
    """
    num_moved, (n, slots) = int((group.own_starts() > 0).sum()), group.ids.shape
    splits = slots == 1 and k_nQKD.shape[1] == group.table.page_size and 0 < num_moved < n
    for pages in (slice(0, num_moved), slice(num_moved, n)) if splits else (slice(0, n),):
        records = (page_records(group, x, pages) for x in (k_nQKD, v_nQKD))
        store.write(layer, group.ids[pages].flatten(), *records)


def page_records(group: PageGroup, x_nQKD: Tensor, pages: slice) -> Tensor:
    """Lay tokens of some pages out as stored pages [n*O, W, K, D]: sinks at the right of their room, zeros elsewhere.

    Without sinks, and where a stored page has as many rows as `x` has, that is the same memory.
    """
    size, slots = group.table.page_size, group.ids.shape[1]
    x_nQKD = x_nQKD[pages]
    if slots == 1 and x_nQKD.shape[1] == size and not bool(group.own_starts()[pages].any()):
        return x_nQKD
    n, num_rows, K, D = x_nQKD.shape
    rows, places = _moves(group, pages, num_rows, x_nQKD.device)
    records = x_nQKD.new_zeros(n * slots * size, K, D)
    records.index_copy_(0, places, x_nQKD.flatten(0, 1).index_select(0, rows))
    return records.reshape(n * slots, size, K, D)


def _moves(group: PageGroup, pages: slice, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which rows of [n*Q] hold tokens, and their places in [n*O*W]; worked out once for all layers on a device."""
    key = (pages.start, pages.stop, num_rows, device)
    if key not in group.moves:
        lengths, starts = group.lengths[pages].sum(1, keepdim=True), group.own_starts()[pages, :1]
        first = torch.arange(len(lengths))[:, None]
        inside = torch.arange(num_rows)
        held = inside < lengths
        rows = (first * num_rows + inside)[held]
        places = (first * group.ids.shape[1] * group.table.page_size + starts + inside)[held]
        group.moves[key] = (rows.to(device, non_blocking=True), places.to(device, non_blocking=True))
    return group.moves[key]
