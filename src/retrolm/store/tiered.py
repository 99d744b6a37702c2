"""Pages in host memory with a least-recently-used cache of pages on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError
from .layout import PageLayout, PageStore, Slabs, StoreBytes, StoreStats
from .pinned import PinnedSlabs

_CPU = torch.device("cpu")


class HostPages(Protocol):
    """The lower tier of one layer: `Slabs` in host memory, or pages on disk."""

    def grow(self, num_pages: int) -> None: ...

    def write(self, ids: Tensor, keys: Tensor, values: Tensor) -> None: ...

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]: ...


def slots_of(name: str, layout: PageLayout, cap_bytes: int, min_pages: int) -> int:
    """Pages per layer that a cap holds; raises `UserError` if they are fewer than one read needs."""
    slots = cap_bytes // (layout.page_bytes * layout.num_layers)
    if slots < min_pages:
        needed = min_pages * layout.page_bytes * layout.num_layers
        raise UserError(
            f"{name}={cap_bytes} holds {slots} pages per layer, but one page with its selected pages takes "
            f"{min_pages}. Use at least {needed} bytes, or a smaller kv_budget."
        )
    return slots


class TieredStore(PageStore):
    """Host tier for all pages, device tier for the pages used last.

    Pages are written to both tiers. A read copies the missing pages to the device and evicts those whose last use
    lies furthest back. With CUDA the host tier is pinned, and pages go to it and come ahead of need (`prefetch`) on
    streams of their own. The device tier takes no more room than there are pages.

    Args:
        device_bytes: cap on KV bytes on the device, over all layers.
        min_pages: pages per layer that one read needs at once; raises `UserError` if the cap is smaller.
        host: the lower tier of each layer, if it isn't host memory.
    """

    def __init__(
        self, layout: PageLayout, device_bytes: int, min_pages: int, host: Sequence[HostPages] | None = None
    ) -> None:
        super().__init__(layout)
        slots = slots_of("device_kv_bytes", layout, device_bytes, min_pages)
        self._host: Sequence[HostPages] = host or [PinnedSlabs(layout, device) for device in layout.devices]
        self._cache = [LayerCache(layout, device, slots) for device in layout.devices]
        self._num_written = 0

    def _grow(self, num_pages: int) -> None:
        for host, cache in zip(self._host, self._cache, strict=True):
            host.grow(num_pages)
            cache.grow(num_pages)

    def _write(self, layer: int, ids: Tensor, first: Tensor, second: Tensor) -> None:
        ids, host = ids.to(_CPU), self._host[layer]
        if isinstance(host, PinnedSlabs):
            host.write(ids, first, second)
        else:
            host.write(ids, first.to(_CPU), second.to(_CPU))
        self._cache[layer].insert(ids, first, second)
        self._num_written += len(ids)

    def _read(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self._cache[layer].read(ids, self._host[layer])

    def _locate(
        self, layer: int, picked_nS: Tensor, ids_P: Tensor, own_nO: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        return self._cache[layer].locate(picked_nS, ids_P, own_nO, self._host[layer])

    def can_prefetch(self, layer: int) -> bool:
        return self._cache[layer].can_prefetch

    def prefetch(self, layer: int, ids: Tensor) -> None:
        self._cache[layer].prefetch(ids, self._host[layer])

    def bytes(self) -> StoreBytes:
        host = self.num_used * self.layout.page_bytes * self.layout.num_layers
        return StoreBytes(device=sum(cache.slabs.bytes() for cache in self._cache), host=host)

    def stats(self) -> StoreStats:
        fetched = sum(cache.num_fetched for cache in self._cache)
        return StoreStats(
            pages_read=sum(cache.num_reads for cache in self._cache),
            pages_missed=sum(cache.num_misses for cache in self._cache),
            pages_fetched=fetched,
            bytes_to_device=fetched * self.layout.page_bytes,
            bytes_to_host=self._num_written * self.layout.page_bytes,
            pin_s=sum(host.pin_s for host in self._host if isinstance(host, PinnedSlabs)),
        )

    @property
    def hit_rate(self) -> float:
        """Share of page reads that found their page on the device."""
        return self.stats().hit_rate


class LayerCache:
    """The device tier of one layer: which page stands in which slot, and when it was last used.

    While it has a slot for every page, each stands in the slot of its own number, and nothing waits for the host.

    Args:
        slots: most pages it may hold.
    """

    def __init__(self, layout: PageLayout, device: torch.device, slots: int) -> None:
        self.slabs = Slabs(layout, device)
        self._device = device
        self._most = slots
        self._page_in = torch.empty(0, dtype=torch.int64)
        self._used = torch.empty(0, dtype=torch.int64)
        self._slot_of = torch.empty(0, dtype=torch.int64)
        self._clock = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prefetched: torch.cuda.Event | None = None
        self.num_reads = 0
        self.num_misses = 0
        self.num_fetched = 0

    def grow(self, num_pages: int) -> None:
        self._slot_of = torch.cat([self._slot_of, torch.full((num_pages,), -1)])
        missing = min(self._most, len(self._slot_of)) - len(self._page_in)
        if missing > 0:
            self.slabs.grow(missing)
            self._page_in = torch.cat([self._page_in, torch.full((missing,), -1)])
            self._used = torch.cat([self._used, torch.zeros(missing, dtype=torch.int64)])

    @property
    def _holds_all(self) -> bool:
        return len(self._page_in) == len(self._slot_of)

    @property
    def can_prefetch(self) -> bool:
        """Whether there is a stream for it, and pages that are not here."""
        return self._stream is not None and not self._holds_all

    def insert(self, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Take over pages that were just written (`ids` on the host); what doesn't fit is dropped from the cache."""
        self._wait_for_prefetch()
        self._clock += 1
        if self._holds_all:
            self._page_in[ids] = self._slot_of[ids] = ids
            self._used[ids] = self._clock
            self.slabs.write(ids, keys, values)
            return
        slots = self._slot_of[ids]
        self._page_in[slots[slots >= 0]] = -1
        self._used[slots[slots >= 0]] = 0
        self._slot_of[ids] = -1
        if len(ids) <= len(self._page_in):
            self.slabs.write(self._claim(ids), keys, values)

    def read(self, ids: Tensor, host: HostPages) -> tuple[Tensor, Tensor]:
        """Return pages `ids` on the device, in parts if they don't fit the cache together."""
        if self._holds_all:
            self.num_reads += len(ids)
            return self.slabs.read(ids)
        ids = ids.to(_CPU)
        unique = ids.unique()
        capacity = len(self._page_in)
        if len(unique) <= capacity:
            self._make_ready(unique, host)
            return self.slabs.read(self._slot_of[ids])
        half = len(ids) // 2
        first, second = self.read(ids[:half], host), self.read(ids[half:], host)
        return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])

    def locate(
        self, picked_nS: Tensor, ids_P: Tensor, own_nO: Tensor, host: HostPages
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Bring pages to the device and say where they stand (`PageStore._locate`); None if they don't fit together."""
        if self._holds_all:
            self.num_reads += picked_nS.numel() + own_nO.numel()
            return self.slabs.table(), picked_nS, ids_P, own_nO
        past_ids = ids_P[picked_nS.clamp(min=0)].where(picked_nS >= 0, own_nO[:, :1])
        ids = torch.cat([past_ids, own_nO], 1).to(_CPU)
        unique = ids.unique()
        if len(unique) > len(self._page_in):
            return None
        self._make_ready(unique, host)
        slots = self._slot_of[ids].to(self._device, non_blocking=True)
        return self.slabs.table(), picked_nS[:, :0], ids_P, slots

    def _make_ready(self, unique: Tensor, host: HostPages) -> None:
        self._wait_for_prefetch()
        self.num_reads += len(unique)
        self.num_misses += self._load(unique, host)

    def prefetch(self, ids: Tensor, host: HostPages) -> None:
        """Load pages on a stream of its own; only the next use of this layer waits for it."""
        if self._stream is None or not self.can_prefetch:
            return
        unique = ids.to(_CPU).unique()[: len(self._page_in) // 2]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._load(unique, host)
            self._prefetched = self._stream.record_event()

    def _load(self, unique: Tensor, host: HostPages) -> int:
        """Make sure the pages `unique` are in the cache; returns how many were not."""
        self._clock += 1
        slots = self._slot_of[unique]
        missing = unique[slots < 0]
        self._used[slots[slots >= 0]] = self._clock
        if len(missing):
            self.num_fetched += len(missing)
            self._fetch(missing, host)
        return len(missing)

    def _fetch(self, missing: Tensor, host: HostPages) -> None:
        if isinstance(host, PinnedSlabs):
            host.load(missing, self.slabs, self._claim(missing))
            return
        keys, values = host.read(missing)
        keys, values = keys.to(self._device, non_blocking=True), values.to(self._device, non_blocking=True)
        self.slabs.write(self._claim(missing), keys, values)

    def _wait_for_prefetch(self) -> None:
        """Slots that a prefetch is still filling may be read or given away only after it."""
        if self._prefetched is not None:
            torch.cuda.current_stream(self._device).wait_event(self._prefetched)
            self._prefetched = None

    def _claim(self, ids: Tensor) -> Tensor:
        """Give each page the slot whose page was used longest ago; returns the slots."""
        victims = self._used.topk(len(ids), largest=False).indices
        evicted = self._page_in[victims]
        self._slot_of[evicted[evicted >= 0]] = -1
        self._page_in[victims] = ids
        self._slot_of[ids] = victims
        self._used[victims] = self._clock
        return victims
