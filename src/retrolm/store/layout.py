"""The shape of a stored page and the interface of a page store."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import gather
from .fetch import MANY_PROGRAMS, WORD, copy_records, has_triton
from .quantise import dequantise, quantise, record_bytes


@dataclass(frozen=True)
class PageLayout:
    """Shape of one page of one layer: keys and values, each [W, K, D], keys before RoPE.

    Attributes:
        devices: compute device of each layer.
        dtype: dtype of the numbers that are read; a page is rounded to it once, when written.
        bits: 16 = numbers are stored in `dtype` as they are; 8 or 4 = as whole numbers of so many bits with scales
            beside them (`quantise`), made once, when written.
    """

    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    bits: int = 16

    @property
    def num_layers(self) -> int:
        return len(self.devices)

    @property
    def page_shape(self) -> tuple[int, int, int]:
        return (self.page_size, self.num_kv_heads, self.head_dim)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of each of the two halves of a stored page: keys and values, or half a quantised record."""
        return self.page_shape if self.bits == 16 else (record_bytes(self.page_shape, self.bits) // 2,)

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.dtype if self.bits == 16 else torch.uint8

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in one layer."""
        return 2 * math.prod(self.stored_shape) * self.stored_dtype.itemsize


@dataclass(frozen=True)
class StoreBytes:
    """KV bytes by place."""

    device: int
    host: int
    disk: int = 0


@dataclass(frozen=True)
class StoreStats:
    """What has moved between tiers since the store was made.

    Attributes:
        pages_read: pages that reads asked for; where not all are on the device, each counts once per read.
        pages_missed: those of them that were not on the device.
        bytes_to_device, bytes_to_host: what that moved. pin_s: seconds it took to pin host memory.
    """

    pages_read: int = 0
    pages_missed: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    pin_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of page reads that found their page on the device."""
        return 1.0 - self.pages_missed / max(self.pages_read, 1)


class PageStore(ABC):
    """Keys and values of pages, addressed by (layer, page number).

    Page numbers are handed out by `reserve` and given back by `release`. Reading a page that was never written is a
    programming error and returns unspecified numbers.
    """

    def __init__(self, layout: PageLayout) -> None:
        self.layout = layout
        self._free: list[int] = []
        self._lock = threading.Lock()
        self._capacity = 0

    def reserve(self, num_pages: int) -> Tensor:
        """Return `num_pages` unused page numbers, int64, ascending and contiguous where possible."""
        with self._lock:
            missing = num_pages - len(self._free)
            if missing > 0:
                self._grow(missing)
                self._free.extend(range(self._capacity, self._capacity + missing))
                self._capacity += missing
            self._free.sort()
            taken, self._free = self._free[:num_pages], self._free[num_pages:]
        return torch.tensor(taken, dtype=torch.int64)

    def release(self, ids: Tensor | Sequence[int]) -> None:
        """Give page numbers back; their contents may be overwritten."""
        with self._lock:
            self._free.extend(int(i) for i in ids)

    @property
    def num_used(self) -> int:
        """Pages handed out and not released."""
        return self._capacity - len(self._free)

    @abstractmethod
    def _grow(self, num_pages: int) -> None:
        """Make room for `num_pages` more pages behind the present capacity."""

    def write(self, layer: int, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store pages: `ids` int64 [N], `keys` and `values` [N, W, K, D] on the layer's device."""
        layout = self.layout
        if layout.bits == 16:
            self._write(layer, ids, keys.to(layout.dtype), values.to(layout.dtype))
        else:
            self._write(layer, ids, *quantise(keys.to(layout.dtype), values.to(layout.dtype), layout.bits))

    def read(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [N, W, K, D] of pages `ids` (int64 [N], repeats allowed) on the layer's device."""
        halves = self._read(layer, ids)
        layout = self.layout
        return halves if layout.bits == 16 else dequantise(*halves, layout.page_shape, layout.bits, layout.dtype)

    def stored(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of pages as they are stored, [N, *stored_shape] each: keys and values, or quantised."""
        return self._read(layer, ids)

    def gather_rotated(
        self,
        layer: int,
        picked_nS: Tensor,
        ids_P: Tensor,
        own_nO: Tensor,
        span: slice,
        cos: Tensor,
        sin: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor] | None:
        """Selected and own pages as one row, keys rotated (see `gather`); None where only `read` can bring them.

        Args:
            ids_P, own_nO: page numbers.
        """
        if not (gather.runs_on(self.layout.devices[layer]) and gather.knows(self.layout)):
            return None
        found = self._locate(layer, picked_nS, ids_P, own_nO)
        return None if found is None else gather.gather_rotated(*found, self.layout, span, cos, sin, dtype)

    def _locate(
        self, layer: int, picked_nS: Tensor, ids_P: Tensor, own_nO: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Make pages ready on the device: the table, ordinals, and places that `gather.gather_rotated` takes."""
        return None

    @abstractmethod
    def _write(self, layer: int, ids: Tensor, first: Tensor, second: Tensor) -> None:
        """Keep the two halves of stored pages, [N, *stored_shape] each."""

    @abstractmethod
    def _read(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two halves of stored pages, [N, *stored_shape] each, on the layer's device."""

    @abstractmethod
    def want(self, layer: int, picked_nS: Tensor, ids_P: Tensor) -> None:
        """Start bringing what `gather_rotated` is asked for next, in one call or several; changes no result."""

    @abstractmethod
    def bytes(self) -> StoreBytes:
        """Bytes held now."""

    def stats(self) -> StoreStats:
        """What has moved so far; nothing where all pages stay on the device."""
        return StoreStats()


class Slabs:
    """Stored pages of one layer in a few large blocks, so that growing never copies what is there.

    A page is two tensors of `stored_shape`, called keys and values here (a quantised page's are halves of a record).
    Memory is taken from the operating system as pages are written, not when a slab is made.
    """

    def __init__(self, layout: PageLayout, device: torch.device, pin: bool = False) -> None:
        self._layout = layout
        self._device = device
        self._pin = pin
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._first: list[int] = []
        self._bounds = torch.empty(0, dtype=torch.int64)
        self._addresses: list[Tensor] = []
        self._table: Tensor | None = None
        self.capacity = 0

    def grow(self, num_pages: int) -> None:
        """Add a slab of `num_pages` pages."""
        shape = (num_pages, *self._layout.stored_shape)
        for slabs in (self._keys, self._values):
            slabs.append(torch.empty(shape, dtype=self._layout.stored_dtype, device=self._device, pin_memory=self._pin))
        self._first.append(self.capacity)
        self._bounds = torch.tensor(self._first[1:], dtype=torch.int64)
        base = torch.tensor([[self._keys[-1].data_ptr()], [self._values[-1].data_ptr()]])
        self._addresses.append(base + torch.arange(num_pages) * (self._layout.page_bytes // 2))
        self._table = None
        self.capacity += num_pages

    def write(self, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values` [N, *stored_shape] as pages `ids` [N]."""
        if self._by_address:
            self._copy((keys.contiguous(), values.contiguous()), ids, out=False)
            return
        for index, inside in self._parts(ids):
            where = slice(None) if inside is None else inside
            local = (ids[where] - self._first[index]).to(self._device, non_blocking=True)
            self._keys[index].index_copy_(0, local, keys[where])
            self._values[index].index_copy_(0, local, values[where])

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [N, *stored_shape] of pages `ids` [N]."""
        if self._by_address:
            shape = (len(ids), *self._layout.stored_shape)
            halves = [torch.empty(shape, dtype=self._layout.stored_dtype, device=self._device) for _ in range(2)]
            self._copy((halves[0], halves[1]), ids, out=True)
            return halves[0], halves[1]
        parts = self._parts(ids)
        if len(parts) == 1 and parts[0][1] is None:
            index = parts[0][0]
            local = (ids - self._first[index]).to(self._device)
            return self._keys[index].index_select(0, local), self._values[index].index_select(0, local)
        shape = (len(ids), *self._layout.stored_shape)
        keys = torch.empty(shape, dtype=self._layout.stored_dtype, device=self._device)
        values = torch.empty_like(keys)
        for index, inside in parts:
            local = (ids[inside] - self._first[index]).to(self._device)
            where = torch.arange(len(ids), device=self._device) if inside is None else inside.to(self._device)
            keys.index_copy_(0, where, self._keys[index].index_select(0, local))
            values.index_copy_(0, where, self._values[index].index_select(0, local))
        return keys, values

    @property
    def _by_address(self) -> bool:
        """Whether pages are copied from and to addresses: several slabs would make the host wait for `ids`."""
        many = len(self._first) > 1 and self._device.type == "cuda"
        return many and has_triton() and (self._layout.page_bytes // 2) % WORD == 0

    def _copy(self, halves: tuple[Tensor, Tensor], ids: Tensor, out: bool) -> None:
        """Copy pages `ids` to (`out`) or from `halves` [N, *stored_shape], on the device's stream."""
        half = self._layout.page_bytes // 2
        there = self.table()[:, ids.to(self._device, non_blocking=True)]
        steps = torch.arange(len(ids), device=self._device) * half
        here = torch.stack([steps + part.data_ptr() for part in halves])
        source, target = (there, here) if out else (here, there)
        copy_records(source.flatten(), target.flatten(), half, MANY_PROGRAMS)

    def bytes(self) -> int:
        """Bytes reserved by all slabs."""
        return sum(slab.nbytes for slab in (*self._keys, *self._values))

    def addresses(self) -> Tensor:
        """Where all pages lie in memory, int64 [2, capacity] on the host: addresses of keys and of values."""
        return torch.cat([torch.empty(2, 0, dtype=torch.int64), *self._addresses], 1)

    def table(self) -> Tensor:
        """Addresses of all pages, int64 [2, capacity], on the device of the pages."""
        if self._table is None:
            self._table = self.addresses().to(self._device, non_blocking=True)
        return self._table

    def _parts(self, ids: Tensor) -> list[tuple[int, Tensor | None]]:
        """Which slab holds which of `ids`: (slab, places in `ids`); places are None where one slab holds all."""
        if len(self._first) == 1:
            return [(0, None)]
        slab_of = torch.bucketize(ids, self._bounds.to(ids.device), right=True)
        used = slab_of.unique().tolist()
        if len(used) == 1:
            return [(used[0], None)]
        return [(index, (slab_of == index).nonzero().flatten()) for index in used]
