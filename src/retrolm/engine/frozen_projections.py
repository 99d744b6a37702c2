"""The projections bookmark rows go through while the model's own are being trained: the weights W^b was learned on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .backbone import Backbone


class FrozenProjections:
    """Copies of all q/k/v projections as they are now."""

    def __init__(self, backbone: Backbone) -> None:
        self._kept: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}
        self._constant_keys = {layer for layer, info in enumerate(backbone.layers) if info.key_bias is not None}
        for layer, info in enumerate(backbone.layers):
            for name in info.projections:
                module: Any = getattr(info.attention, name)
                bias = None if module.bias is None else module.bias.detach().clone()
                self._kept[layer, name] = (module.weight.detach().clone(), bias)

    def weight(self, layer: int, name: str) -> Tensor:
        """The weight [out, in] as it was."""
        return self._kept[layer, name][0]

    def bias(self, layer: int, name: str) -> Tensor | None:
        """The bias [out] as it was, if there is one."""
        return self._kept[layer, name][1]

    def project(self, layer: int, name: str, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Project normed rows [..., in] → [..., out] in `dtype`; for keys also without the bias, where there is one."""
        weight, bias = self._kept[layer, name]
        content = linear(rows, weight.to(rows.dtype)).to(dtype)
        has_constant = name == "k_proj" and layer in self._constant_keys
        return content if bias is None else content + bias.to(dtype), content if has_constant else None
