"""Page digests (bookmark keys and the like): small, and always on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class DigestIndex:
    """One row per page and layer, addressed like pages in the store."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}

    def write(self, layer: int, ids: Tensor, digests_NE: Tensor) -> None:
        """Store digests [N, E] as pages `ids` int64 [N]."""
        rows = self._rows.get(layer)
        needed = int(ids.max()) + 1
        if rows is None or needed > len(rows):
            rows = self._grown(rows, needed, digests_NE)
            self._rows[layer] = rows
        rows.index_copy_(0, ids.to(rows.device, non_blocking=True), digests_NE.to(rows.dtype))

    def read(self, layer: int, ids: Tensor) -> Tensor:
        """Return digests [N, E] of pages `ids`."""
        rows = self._rows[layer]
        return rows.index_select(0, ids.to(rows.device))

    def layers(self) -> list[int]:
        """Layers that have digests."""
        return sorted(self._rows)

    def bytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows.values())

    @staticmethod
    def _grown(rows: Tensor | None, needed: int, like: Tensor) -> Tensor:
        capacity = max(needed, 64 if rows is None else len(rows) * 5 // 4)  # of a million tokens they are half a GB
        grown = torch.zeros(capacity, like.shape[1], dtype=like.dtype, device=like.device)
        if rows is not None:
            grown[: len(rows)] = rows
        return grown
