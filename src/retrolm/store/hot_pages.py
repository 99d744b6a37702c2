"""The device tier of one layer where the device itself decides: no read or write makes the host wait.

A table of addresses says where each page stands: in a slot, where it was just computed, or in pinned host memory,
which kernels read over the bus. So a page that found no slot is read from there, and nothing ever has to fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fetch import MANY_PROGRAMS, WORD, copy_records, has_triton
from .layout import PageLayout, Slabs
from .pinned import PinnedSlabs


def can_decide(layout: PageLayout, device: torch.device) -> bool:
    """Whether `HotPages` works there: with kernels, on records of whole words."""
    return device.type == "cuda" and has_triton() and (layout.page_bytes // 2) % WORD == 0


class HotPages:
    """Pages used last, in slots on the device; the newest ones where they were computed, until `settle`.

    Args:
        slots: most pages it may hold. host: all pages of the layer.
    """

    def __init__(self, layout: PageLayout, device: torch.device, slots: int, host: PinnedSlabs) -> None:
        self.slabs = Slabs(layout, device)
        self._layout = layout
        self._device = device
        self._most = slots
        self._host = host
        self._clock = 0
        self._fresh: list[Tensor] = []
        self._page_in, self._used, self._slot_of, self._asked = (self._none() for _ in range(4))
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        self._table = self._home = torch.empty(2, 0, dtype=torch.int64, device=device)

    def grow(self, num_pages: int) -> None:
        """Make room for pages that `host` has room for."""
        known = self._table.shape[1]
        self._home = self._host.addresses().to(self._device)
        self._table = torch.cat([self._table, self._home[:, known:]], 1)
        self._slot_of = self._longer(self._slot_of, num_pages, -1)
        self._asked = self._longer(self._asked, num_pages, 0)
        missing = min(self._most, known + num_pages) - len(self._page_in)
        if missing > 0:
            self.slabs.grow(missing)
            self._page_in = self._longer(self._page_in, missing, -1)
            self._used = self._longer(self._used, missing, 0)

    def write(self, ids: Tensor, first: Tensor, second: Tensor) -> None:
        """Take over pages `ids` (on the host), kept where they are, and start copying them to the host."""
        from .hot_kernel import put

        if sum(map(len, self._fresh)) + len(ids) > self._most:
            self.settle()
        halves = (first.contiguous(), second.contiguous())
        self._host.write(ids, *halves)
        there = ids.to(self._device, non_blocking=True)
        put(there, halves, self._table, self._slot_of, self._page_in, self._used)
        self._fresh.append(there)

    def settle(self) -> None:
        """Let go of the memory in which pages were computed: they stand on the host by now."""
        from .hot_kernel import send_home

        self._host.settle()
        for ids in self._fresh:
            send_home(ids, self._table, self._home, self._slot_of)
        self._fresh.clear()

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the halves of pages `ids` on the device, from wherever they are; what is read whole takes no slots."""
        ids, half = ids.to(self._device, non_blocking=True), self._layout.page_bytes // 2
        shape = (2, len(ids), *self._layout.stored_shape)
        halves = torch.empty(shape, dtype=self._layout.stored_dtype, device=self._device)
        first = halves.data_ptr()
        targets = torch.arange(first, first + halves.nbytes, half, device=self._device)
        copy_records(self._table[:, ids].flatten(), targets, half, MANY_PROGRAMS)
        return halves[0], halves[1]

    def want(self, picked_nS: Tensor, ids_P: Tensor) -> None:
        """Bring pages to the device: ordinals, -1 = none, and which page each ordinal is."""
        from .hot_kernel import bring

        if not picked_nS.numel():
            return
        self._clock += 1
        bring(
            picked_nS.contiguous(), ids_P, self._table, self._home, self.slabs.table(), self._slot_of, self._page_in,
            self._used, self._asked, self._counts, self._clock, self._layout.page_bytes // 2,
        )  # fmt: skip

    def locate(self, picked_nS: Tensor, ids_P: Tensor, own_nO: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Say where pages stand (`PageStore._locate`), wanted or not."""
        return self._table, picked_nS, ids_P, own_nO

    def reads(self) -> tuple[int, int]:
        """Pages asked for so far, each once per `want`, and those of them that were in host memory alone."""
        read, missed = self._counts[2:].tolist()
        return read, missed

    def _none(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=self._device)

    def _longer(self, row: Tensor, num: int, value: int) -> Tensor:
        return torch.cat([row, row.new_full((num,), value)])
