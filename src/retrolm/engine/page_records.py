"""Fresh keys and values of a group as the records that a page store keeps.

Shape letters: n pages of a group, Q rows of each, O own slots, W page size, K KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk import PageGroup


def page_records(group: PageGroup, x_nQKD: Tensor) -> Tensor:
    """Lay tokens out as stored pages [n*O, W, K, D]: sink pages at the right of their room, zeros elsewhere."""
    size = group.table.page_size
    slots = group.ids.shape[1]
    if slots == 1 and x_nQKD.shape[1] == size and bool((group.lengths == size).all()):
        return x_nQKD
    n, num_rows, K, D = x_nQKD.shape
    rows, places = _moves(group, num_rows, x_nQKD.device)
    records = x_nQKD.new_zeros(n * slots * size, K, D)
    records.index_copy_(0, places, x_nQKD.flatten(0, 1).index_select(0, rows))
    return records.reshape(n * slots, size, K, D)


def _moves(group: PageGroup, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which rows of [n*Q] hold tokens, and their places in [n*O*W]; worked out once for all layers on a device."""
    key = (num_rows, device)
    if key not in group.moves:
        lengths, starts = group.lengths.sum(1, keepdim=True), group.own_starts()[:, :1]
        first = torch.arange(len(group))[:, None]
        inside = torch.arange(num_rows)
        held = inside < lengths
        rows = (first * num_rows + inside)[held]
        places = (first * group.ids.shape[1] * group.table.page_size + starts + inside)[held]
        group.moves[key] = (rows.to(device, non_blocking=True), places.to(device, non_blocking=True))
    return group.moves[key]
