"""Fresh keys and values of a group as the records that a page store keeps.

Shape letters: n pages of a group, Q rows of each, O own slots, W page size, K KV heads, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from .chunk import PageGroup


def page_records(group: PageGroup, x_nQKD: Tensor) -> Tensor:
    """Lay tokens out as stored pages [n*O, W, K, D]: sink pages at the right of their room, zeros elsewhere."""
    size = group.table.page_size
    slots = group.ids.shape[1]
    if slots == 1 and x_nQKD.shape[1] == size and bool((group.lengths == size).all()):
        return x_nQKD
    n, _, K, D = x_nQKD.shape
    records = x_nQKD.new_zeros(n, slots * size, K, D)
    starts = group.own_starts()[:, 0].tolist()
    for row, (start, length) in enumerate(zip(starts, group.lengths.sum(1).tolist(), strict=True)):
        records[row, start : start + length] = x_nQKD[row, :length]
    return records.reshape(n * slots, size, K, D)
