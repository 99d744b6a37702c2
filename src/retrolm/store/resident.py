"""All pages on the compute device."""

from __future__ import annotations

from torch import Tensor

from .layout import PageLayout, PageStore, Slabs, StoreBytes


class ResidentStore(PageStore):
    """Keeps every page on its layer's device; on a CPU this is plain host memory used in place."""

    def __init__(self, layout: PageLayout) -> None:
        super().__init__(layout)
        self._layers = [Slabs(layout, device) for device in layout.devices]

    def _grow(self, num_pages: int) -> None:
        for slabs in self._layers:
            slabs.grow(num_pages)

    def _write(self, layer: int, ids: Tensor, first: Tensor, second: Tensor) -> None:
        self._layers[layer].write(ids, first, second)

    def _read(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self._layers[layer].read(ids)

    def _locate(
        self, layer: int, picked_nS: Tensor, ids_P: Tensor, own_nO: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._layers[layer].table(), picked_nS, ids_P, own_nO

    def want(self, layer: int, picked_nS: Tensor, ids_P: Tensor) -> None:
        """Nothing to bring: all pages are where they are needed."""

    def bytes(self) -> StoreBytes:
        return StoreBytes(device=self.num_used * self.layout.page_bytes * self.layout.num_layers, host=0)
