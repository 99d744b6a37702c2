"""Pages in host memory with a least-recently-used cache of pages on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError
from .hot_pages import HotPages, can_decide
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


class DeviceTier(Protocol):
    """One layer's pages: the host tier below, and on the device those used last."""

    slabs: Slabs

    def grow(self, num_pages: int) -> None: ...

    def write(self, ids: Tensor, first: Tensor, second: Tensor) -> None: ...

    def settle(self) -> None: ...

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]: ...

    def locate(
        self, picked_nS: Tensor, ids_P: Tensor, own_nO: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None: ...

    def want(self, picked_nS: Tensor, ids_P: Tensor) -> None: ...

    def reads(self) -> tuple[int, int]: ...


class TieredStore(PageStore):
    """Host tier for all pages, device tier for the pages used last.

    A read copies the missing pages to the device and evicts those whose last use lies furthest back. With CUDA the
    host tier is pinned, pages go to it on streams of their own, and the device decides itself what is missing
    (`HotPages`). The device tier takes no more room than there are pages.

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
        self._tiers = [_tier(layout, *pair, slots) for pair in zip(layout.devices, self._host, strict=True)]
        self._open_layer = 0  # the layer written last; no other one waits for copies
        self._num_written = 0

    def _grow(self, num_pages: int) -> None:
        for host, tier in zip(self._host, self._tiers, strict=True):
            host.grow(num_pages)
            tier.grow(num_pages)

    def _write(self, layer: int, ids: Tensor, first: Tensor, second: Tensor) -> None:
        if self._open_layer != layer:
            self._tiers[self._open_layer].settle()
            self._open_layer = layer
        self._tiers[layer].write(ids.to(_CPU), first, second)
        self._num_written += len(ids)

    def _read(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self._tiers[layer].read(ids)

    def _locate(
        self, layer: int, picked_nS: Tensor, ids_P: Tensor, own_nO: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        return self._tiers[layer].locate(picked_nS, ids_P, own_nO)

    def want(self, layer: int, picked_nS: Tensor, ids_P: Tensor) -> None:
        self._tiers[layer].want(picked_nS, ids_P)

    def bytes(self) -> StoreBytes:
        host = self.num_used * self.layout.page_bytes * self.layout.num_layers
        return StoreBytes(device=sum(tier.slabs.bytes() for tier in self._tiers), host=host)

    def stats(self) -> StoreStats:
        read, missed = (sum(column) for column in zip(*(tier.reads() for tier in self._tiers), strict=True))
        return StoreStats(
            pages_read=read,
            pages_missed=missed,
            bytes_to_device=missed * self.layout.page_bytes,
            bytes_to_host=self._num_written * self.layout.page_bytes,
            pin_s=sum(host.pin_s for host in self._host if isinstance(host, PinnedSlabs)),
        )

    @property
    def hit_rate(self) -> float:
        """Share of page reads that found their page on the device."""
        return self.stats().hit_rate


def _tier(layout: PageLayout, device: torch.device, host: HostPages, slots: int) -> DeviceTier:
    if isinstance(host, PinnedSlabs) and can_decide(layout, device):
        return HotPages(layout, device, slots, host)
    return LayerCache(layout, device, slots, host)


class LayerCache:
    """The device tier of one layer where the host decides: which page stands in which slot, when it was last used.

    While it has a slot for every page, each stands in the slot of its own number, and nothing waits for the host.

    Args:
        slots: most pages it may hold. host: all pages of the layer.
    """

    def __init__(self, layout: PageLayout, device: torch.device, slots: int, host: HostPages) -> None:
        self.slabs = Slabs(layout, device)
        self._device = device
        self._host = host
        self._most = slots
        self._page_in = torch.empty(0, dtype=torch.int64)
        self._used = torch.empty(0, dtype=torch.int64)
        self._slot_of = torch.empty(0, dtype=torch.int64)
        self._clock = 0
        self._num_reads = 0
        self._num_misses = 0

    def grow(self, num_pages: int) -> None:
        """Make room for pages that the host has room for."""
        self._slot_of = torch.cat([self._slot_of, torch.full((num_pages,), -1)])
        missing = min(self._most, len(self._slot_of)) - len(self._page_in)
        if missing > 0:
            self.slabs.grow(missing)
            self._page_in = torch.cat([self._page_in, torch.full((missing,), -1)])
            self._used = torch.cat([self._used, torch.zeros(missing, dtype=torch.int64)])

    @property
    def _holds_all(self) -> bool:
        return len(self._page_in) == len(self._slot_of)

    def write(self, ids: Tensor, first: Tensor, second: Tensor) -> None:
        """Take over pages `ids` (on the host); what doesn't fit is dropped from the cache."""
        if isinstance(self._host, PinnedSlabs):
            self._host.write(ids, first, second)
        else:
            self._host.write(ids, first.to(_CPU), second.to(_CPU))
        self._clock += 1
        if self._holds_all:
            self._page_in[ids] = self._slot_of[ids] = ids
            self._used[ids] = self._clock
            self.slabs.write(ids, first, second)
            return
        slots = self._slot_of[ids]
        self._page_in[slots[slots >= 0]] = -1
        self._used[slots[slots >= 0]] = 0
        self._slot_of[ids] = -1
        if len(ids) <= len(self._page_in):
            self.slabs.write(self._claim(ids), first, second)

    def settle(self) -> None:
        """Wait for what was written, on the device's side."""
        if isinstance(self._host, PinnedSlabs):
            self._host.settle()

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return pages `ids` on the device, in parts if they don't fit the cache together."""
        if self._holds_all:
            self._num_reads += len(ids)
            return self.slabs.read(ids)
        ids = ids.to(_CPU)
        unique = ids.unique()
        capacity = len(self._page_in)
        if len(unique) <= capacity:
            self._load(unique)
            return self.slabs.read(self._slot_of[ids])
        half = len(ids) // 2
        first, second = self.read(ids[:half]), self.read(ids[half:])
        return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])

    def locate(self, picked_nS: Tensor, ids_P: Tensor, own_nO: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Bring pages to the device and say where they stand (`PageStore._locate`); None if they don't fit together."""
        if self._holds_all:
            self._num_reads += picked_nS.numel() + own_nO.numel()
            return self.slabs.table(), picked_nS, ids_P, own_nO
        past_ids = ids_P[picked_nS.clamp(min=0)].where(picked_nS >= 0, own_nO[:, :1])
        ids = torch.cat([past_ids, own_nO], 1).to(_CPU)
        unique = ids.unique()
        if len(unique) > len(self._page_in):
            return None
        self._load(unique)
        slots = self._slot_of[ids].to(self._device, non_blocking=True)
        return self.slabs.table(), picked_nS[:, :0], ids_P, slots

    def want(self, picked_nS: Tensor, ids_P: Tensor) -> None:
        """Nothing: `locate` brings them, as many as fit together."""

    def reads(self) -> tuple[int, int]:
        """Pages asked for so far, and those of them that were not on the device."""
        return self._num_reads, self._num_misses

    def _load(self, unique: Tensor) -> None:
        """Make sure the pages `unique` are in the cache."""
        self._clock += 1
        self._num_reads += len(unique)
        slots = self._slot_of[unique]
        missing = unique[slots < 0]
        self._used[slots[slots >= 0]] = self._clock
        if len(missing):
            self._num_misses += len(missing)
            halves = (half.to(self._device, non_blocking=True) for half in self._host.read(missing))
            self.slabs.write(self._claim(missing), *halves)

    def _claim(self, ids: Tensor) -> Tensor:
        """Give each page the slot whose page was used longest ago; returns the slots."""
        victims = self._used.topk(len(ids), largest=False).indices
        evicted = self._page_in[victims]
        self._slot_of[evicted[evicted >= 0]] = -1
        self._page_in[victims] = ids
        self._slot_of[ids] = victims
        self._used[victims] = self._clock
        return victims
