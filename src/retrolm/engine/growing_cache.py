"""A transformers cache with room behind its keys and values, so that a step copies no more than itself."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

_ROOM = 256  # places allocated beyond what is needed


class GrowingTensor:
    """A tensor [B, K, T, D] that grows along T: into its room while there is some, else by moving to a larger one."""

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self._view: Tensor | None = None

    def append(self, before: Tensor, new: Tensor) -> Tensor:
        """Return `before` with `new` [B, K, N, D] behind it, as a view; `before` may be any tensor."""
        start, end = before.shape[2], before.shape[2] + new.shape[2]
        if self._room is None or before is not self._view or end > self._room.shape[2]:
            self._room = new.new_empty(*new.shape[:2], end + _ROOM, new.shape[3])
            self._room[:, :, :start] = before
        self._room[:, :, start:end] = new
        self._view = self._room[:, :, :end]
        return self._view


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that doesn't copy all its keys and values at each step."""

    def __init__(self) -> None:
        super().__init__()
        self._growing = GrowingTensor(), GrowingTensor()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, T, D], the new ones last; for inference only."""
        if self.get_seq_length() == 0:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        keys = self._growing[0].append(cast(Tensor, self.keys), key_states)
        values = self._growing[1].append(cast(Tensor, self.values), value_states)
        self.keys, self.values = keys, values
        return keys, values


def growing_cache() -> Cache:
    """An empty cache of such layers."""
    return Cache(layer_class_to_replicate=GrowingLayer)
