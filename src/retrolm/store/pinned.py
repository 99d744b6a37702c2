"""The host tier with CUDA: pinned slabs, written and read without the host waiting for the device."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor

from .layout import PageLayout, Slabs

_CPU = torch.device("cpu")
# PyTorch rounds pinned blocks up to a power of two: a slab's keys, and its values, fill one as nearly as they can.
SLAB_BYTES = 2**24


class PinnedSlabs(Slabs):
    """Pages of one layer in pinned host memory.

    Pinning takes seconds per 10 GB; PyTorch keeps what is freed, so that later stores get it at once.

    Args:
        device: the GPU that pages come from and go to; on a CPU everything is a plain copy.

    Attributes:
        pin_s: seconds spent on pinning.
    """

    def __init__(self, layout: PageLayout, device: torch.device) -> None:
        super().__init__(layout, _CPU, pin=device.type == "cuda")
        self._compute = device
        self._out = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._written: torch.cuda.Event | None = None
        self._leaving: list[Tensor] = []
        self.pin_s = 0.0

    def grow(self, num_pages: int) -> None:
        """Add slabs for `num_pages` pages."""
        if self._out is None:
            super().grow(num_pages)
            return
        most = max(1, SLAB_BYTES // (self._layout.page_bytes // 2))
        started = time.perf_counter()
        for first in range(0, num_pages, most):
            super().grow(min(most, num_pages - first))
        self.pin_s += time.perf_counter() - started

    def write(self, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copy pages `ids` (on the host) from the device, behind what is computed there now.

        Their memory is held until `settle`: given to the stream's keeping it would come back only as the host sees
        the copy done, and a host that runs layers ahead would take new memory for each.
        """
        keys, values = keys.contiguous(), values.contiguous()
        self._leaving += [keys, values]
        if self._out is None:
            super().write(ids, keys, values)
            return
        self._out.wait_stream(torch.cuda.current_stream(self._compute))
        with torch.cuda.stream(self._out):
            for slab, place, where in self._runs(ids):
                num = where.stop - where.start
                self._keys[slab][place : place + num].copy_(keys[where], non_blocking=True)
                self._values[slab][place : place + num].copy_(values[where], non_blocking=True)
            self._written = self._out.record_event()

    def settle(self) -> None:
        """Let what is computed next wait for all copies, and their sources go."""
        if self._written is not None:
            torch.cuda.current_stream(self._compute).wait_event(self._written)
        self._leaving.clear()

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pages `ids`, on the host."""
        if self._written is not None:
            self._written.synchronize()
        return super().read(ids)

    def _runs(self, ids: Tensor) -> Iterator[tuple[int, int, slice]]:
        """Runs of pages that lie behind each other in one slab: slab, first place in it, places in `ids`."""
        pages, start = ids.tolist(), 0
        for stop in range(1, len(pages) + 1):
            if stop < len(pages) and pages[stop] == pages[stop - 1] + 1 and pages[stop] not in self._first:
                continue
            slab = bisect_right(self._first, pages[start]) - 1
            yield slab, pages[start] - self._first[slab], slice(start, stop)
            start = stop
