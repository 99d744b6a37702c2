"""A transformers cache that keeps a part of the prompt's keys and values, at their true positions."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import Cache

from .growing_cache import GrowingLayer


class KeptLayer(GrowingLayer):
    """Keys and values of one layer. The prompt passes through; what stays of it is handed in with `keep`.

    To transformers its length is the number of tokens that passed, so that positions go on where the prompt ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self._num_passed = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what attention may see: the prompt itself, later everything kept."""
        self._num_passed += key_states.shape[2]
        if not self.is_initialized:
            return key_states, value_states
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        return found

    def keep(self, k_BKTD: Tensor, v_BKTD: Tensor) -> None:
        """Hold these keys and values in place of the prompt's."""
        self.lazy_initialization(k_BKTD, v_BKTD)
        self.keys, self.values = k_BKTD, v_BKTD

    def get_seq_length(self) -> int:
        """Tokens that passed, kept or not."""
        return self._num_passed


class KeptCache(Cache):
    """One `KeptLayer` per decoder layer; empty, and so false, until the first layer has seen its prompt.

    (Phi-3's `generate` throws away a cache that is true before a long prompt was read.)
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=KeptLayer)

    def is_kept(self, layer: int) -> bool:
        """Whether what stays of the prompt was handed in for a layer."""
        return layer < len(self.layers) and bool(self._kept()[layer].is_initialized)

    def keep(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> None:
        """See `KeptLayer.keep`."""
        self._kept()[layer].keep(k_BKTD, v_BKTD)

    @property
    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, K, T, D] that each layer holds."""
        return [(cast(Tensor, layer.keys), cast(Tensor, layer.values)) for layer in self._kept()]

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values held."""
        held = (x for layer in self._kept() for x in (layer.keys, layer.values))
        return sum(x.untyped_storage().nbytes() for x in held if x is not None)

    def _kept(self) -> list[KeptLayer]:
        return cast("list[KeptLayer]", self.layers)
