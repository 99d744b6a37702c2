"""What the layers of a model share is worked out by the first of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

_LAYERS = 2  # after so many layers that don't ask for it, a result is forgotten


class Once:
    """Calls functions, and remembers what they gave for the same arguments: tensors by identity, all else by value.

    Layers that keep the same tokens hold the same tensor of their positions. Whatever is worked out from it alone is
    then one call for all of them. What only one layer asks for is forgotten soon: masks of many layers would add up.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[Any, Any]] = {}  # with the arguments, so that no other gets their identity
        self._asked: dict[Hashable, int] = {}
        self._layer = 0

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` gives; it must change nothing."""
        key = (work, *(("tensor", id(x)) if isinstance(x, Tensor) else x for x in arguments))
        if key not in self._found:
            self._found[key] = arguments, work(*arguments)
        self._asked[key] = self._layer
        return self._found[key][1]

    def next_layer(self) -> None:
        """Another layer begins."""
        self._layer += 1
        for key in [key for key, layer in self._asked.items() if layer < self._layer - _LAYERS]:
            del self._found[key], self._asked[key]
