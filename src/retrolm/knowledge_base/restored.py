"""Pages of a base as the engine sees them: a page store and digests that read from disk what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..store import DigestIndex, PageLayout, PageStore, ResidentStore
from ..store.layout import StoreBytes
from .parts import StoredDocument

Rows = Callable[[], Tensor]


@dataclass(frozen=True)
class Stretch:
    """Pages of one stored document that follow one another in a table: from page `skip` of it on."""

    document: StoredDocument
    skip: int

    @property
    def num_pages(self) -> int:
        return self.document.entry.num_pages - self.skip


class RestoredStore(PageStore):
    """Pages on disk under the numbers 0, 1, 2, …, and new ones (questions, turns) behind them in `fresh`.

    Args:
        fresh: where new pages go; None = beside the model.
    """

    def __init__(self, layout: PageLayout, stretches: Sequence[Stretch], fresh: PageStore | None = None) -> None:
        super().__init__(layout)
        self._stretches = list(stretches)
        self._firsts = np.cumsum([0, *(stretch.num_pages for stretch in stretches)])
        self.num_stored = self._capacity = int(self._firsts[-1])
        self._fresh = fresh or ResidentStore(layout)

    @property
    def bytes_read(self) -> int:
        """Bytes of pages read from disk so far."""
        return sum(stretch.document.pages.bytes_read for stretch in self._stretches)

    def _grow(self, num_pages: int) -> None:
        self._fresh.reserve(num_pages)

    def _write(self, layer: int, ids: Tensor, first: Tensor, second: Tensor) -> None:
        assert int(ids.min()) >= self.num_stored, "pages on disk never change"
        self._fresh._write(layer, ids - self.num_stored, first, second)

    def _read(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        on_host = ids.cpu()
        new = on_host >= self.num_stored
        if bool(new.all()):
            return self._fresh._read(layer, ids - self.num_stored)
        device = self.layout.devices[layer]
        unique, inverse = on_host[~new].unique(return_inverse=True)
        first, second = (x.to(device)[inverse.to(device)] for x in self._read_stored(layer, unique))
        if not bool(new.any()):
            return first, second
        there = new.to(device)
        own = self._fresh._read(layer, ids[new.to(ids.device)] - self.num_stored)
        return _joined(there, own[0], first), _joined(there, own[1], second)

    def want(self, layer: int, picked_nS: Tensor, ids_P: Tensor) -> None:
        """Nothing is read from disk before it is read from here."""

    def bytes(self) -> StoreBytes:
        fresh = self._fresh.bytes()
        page_bytes = self.layout.page_bytes * self.layout.num_layers
        return StoreBytes(fresh.device, fresh.host, fresh.disk + self.num_stored * page_bytes)

    def _read_stored(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The halves of ascending page numbers, in host memory."""
        records = torch.empty(len(ids), 2, *self.layout.stored_shape, dtype=self.layout.stored_dtype)
        raw = records.view(torch.uint8).flatten(1).numpy()
        places = ids.numpy()
        owners = np.searchsorted(self._firsts, places, side="right") - 1
        for owner in np.unique(owners).tolist():
            rows = np.flatnonzero(owners == owner)
            stretch = self._stretches[owner]
            pages = places[rows] - self._firsts[owner] + stretch.skip
            stretch.document.pages.read(layer, pages.tolist(), raw, rows.tolist())
        return records[:, 0], records[:, 1]


class RestoredDigests(DigestIndex):
    """Digests of stored pages, read from disk when a layer first needs them, and of new pages in memory."""

    def __init__(self, num_stored: int, stored: dict[int, Rows]) -> None:
        super().__init__()
        self._num_stored = num_stored
        self._stored = stored
        self._loaded: dict[int, Tensor] = {}

    def layers(self) -> list[int]:
        return sorted(self._stored)

    def write(self, layer: int, ids: Tensor, digests_NE: Tensor) -> None:
        super().write(layer, ids - self._num_stored, digests_NE)

    def read(self, layer: int, ids: Tensor) -> Tensor:
        if layer not in self._loaded:
            self._loaded[layer] = self._stored[layer]()
        stored = self._loaded[layer].to(ids.device)
        self._loaded[layer] = stored
        new = ids >= self._num_stored
        if not bool(new.any()):
            return stored.index_select(0, ids)
        return _joined(new, super().read(layer, ids[new] - self._num_stored), stored[ids[~new]])

    def bytes(self) -> int:
        return super().bytes() + sum(rows.nbytes for rows in self._loaded.values())


def _joined(new_N: Tensor, new: Tensor, stored: Tensor) -> Tensor:
    """One tensor [N, ...] of the rows marked new and the others."""
    out = new.new_empty(len(new_N), *new.shape[1:])
    out[new_N] = new
    out[~new_N] = stored.to(new.dtype)
    return out
