"""The disk tier: pages of a text that is larger than host memory lie in a file.

Policy as between host and device: every page is written to the lower tier, the pages used last stay in the upper one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .layout import PageLayout, StoreBytes
from .tiered import LayerCache, TieredStore, slots_of

_CPU = torch.device("cpu")


class SpillFile:
    """An unnamed file of page records; the system deletes it when the process ends, however it ends."""

    def __init__(self, layout: PageLayout, folder: str | Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix="retrolm-pages-")  # noqa: SIM115
        self._descriptor = self._file.fileno()
        self._layout = layout

    def write(self, layer: int, page: int, record: Tensor) -> None:
        """Write the record of one page, [2, *stored_shape]; raises `OSError` if the disk is full."""
        view, at = _bytes_of(record), self._place(layer, page)
        while len(view):
            count = os.pwrite(self._descriptor, view, at)
            view, at = view[count:], at + count

    def read(self, layer: int, page: int, record: Tensor) -> None:
        """Fill `record` [2, *stored_shape] with what was written."""
        view, at = _bytes_of(record), self._place(layer, page)
        while len(view):
            count = os.preadv(self._descriptor, [view], at)
            if not count:
                return  # never written: unspecified numbers, as in every store
            view, at = view[count:], at + count

    def bytes(self) -> int:
        """Bytes the file takes on the disk."""
        return os.fstat(self._descriptor).st_blocks * 512

    def _place(self, layer: int, page: int) -> int:
        return (page * self._layout.num_layers + layer) * self._layout.page_bytes


class FileSlabs:
    """Pages of one layer in a `SpillFile`; offers what `Slabs` does."""

    def __init__(self, file: SpillFile, layout: PageLayout, layer: int) -> None:
        self._file, self._layout, self._layer = file, layout, layer
        self.capacity = 0

    def grow(self, num_pages: int) -> None:
        self.capacity += num_pages

    def write(self, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values` [N, *stored_shape] as pages `ids` [N]."""
        records = torch.stack([keys, values], 1).contiguous()
        for page, record in zip(ids.tolist(), records, strict=True):
            self._file.write(self._layer, page, record)

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [N, *stored_shape] of pages `ids` [N]."""
        records = torch.zeros(len(ids), 2, *self._layout.stored_shape, dtype=self._layout.stored_dtype)
        for page, record in zip(ids.tolist(), records, strict=True):
            self._file.read(self._layer, page, record)
        return records[:, 0], records[:, 1]

    def bytes(self) -> int:
        """Bytes in memory: none."""
        return 0


class CachedSlabs:
    """`FileSlabs` behind a cache in host memory; offers what `Slabs` does."""

    def __init__(self, below: FileSlabs, layout: PageLayout, slots: int) -> None:
        self._below = below
        self._cache = LayerCache(layout, _CPU, slots, below)

    def grow(self, num_pages: int) -> None:
        self._below.grow(num_pages)
        self._cache.grow(num_pages)

    def write(self, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values` [N, *stored_shape] as pages `ids` [N]."""
        self._cache.write(ids, keys, values)

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [N, *stored_shape] of pages `ids` [N]."""
        return self._cache.read(ids)

    def bytes(self) -> int:
        return self._cache.slabs.bytes()


class DiskStore(TieredStore):
    """All pages in a file, those used last in host memory, and of them those used last on the device.

    On a CPU host memory is the device.

    Args:
        host_bytes: cap on KV bytes in host memory, over all layers. device_bytes: the same for the device; needed
            with CUDA.
        folder: where the file is kept; it needs room for the whole text's pages.
        min_pages: pages per layer that one read needs at once; raises `UserError` if a cap is smaller.
    """

    def __init__(
        self,
        layout: PageLayout,
        host_bytes: int,
        folder: str | Path,
        min_pages: int,
        device_bytes: int | None = None,
    ) -> None:
        slots = slots_of("host_kv_bytes", layout, host_bytes, min_pages)
        if device_bytes is None and any(device.type != "cpu" for device in layout.devices):
            raise UserError("host_kv_bytes needs device_kv_bytes on a GPU: without it all pages stay on the device.")
        self._file = SpillFile(layout, folder)
        slabs = [FileSlabs(self._file, layout, layer) for layer in range(layout.num_layers)]
        self._cached = [] if device_bytes is None else [CachedSlabs(below, layout, slots) for below in slabs]
        super().__init__(layout, device_bytes or host_bytes, min_pages, host=self._cached or slabs)

    def bytes(self) -> StoreBytes:
        host = sum(cached.bytes() for cached in self._cached)
        return StoreBytes(device=super().bytes().device, host=host, disk=self._file.bytes())


def _bytes_of(record: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory."""
    return record.view(torch.uint8).numpy().data.cast("B")
