"""The projections bookmark rows go through while the model's own are being trained: the weights W^b was learned on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..retriever import PageRetriever, RetrieverCard
from .backbone import Backbone


class FrozenProjections:
    """Copies of all q/k/v weights as they are now; biases are the model's own, trained or not."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._weights = {
            (layer, name): self._module(layer, name).weight.detach().clone()
            for layer, info in enumerate(backbone.layers)
            for name in info.projections
        }

    def project(self, layer: int, name: str, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Project normed rows [..., in] → [..., out] in `dtype`; for keys also without the bias, where there is one."""
        content = linear(rows, self._weights[layer, name].to(rows.dtype)).to(dtype)
        bias = self._module(layer, name).bias
        has_constant = name == "k_proj" and self._backbone.layers[layer].key_bias is not None
        return content if bias is None else content + bias.to(dtype), content if has_constant else None

    def written_out(self, retriever: PageRetriever | None, bookmark: Tensor, card: RetrieverCard) -> PageRetriever:
        """A retriever of full rank for the model as it is now, whose W^b is the one that was used all along.

        Args:
            retriever: what was used, None = untrained copies. bookmark: embedding [hidden]. card: of rank 0.
        """
        found = PageRetriever(self._backbone.projection_shapes(), bookmark.float().cpu(), card)
        for (layer, name), weight in self._weights.items():
            eye = torch.eye(weight.shape[1], device=weight.device)
            kept = weight.float() if retriever is None else weight.float() + retriever.delta(layer, name, eye).T
            change = kept - self._module(layer, name).weight.detach().float()
            delta: Any = found.deltas[f"layers_{layer}_{name}"]
            delta.weight.data.copy_(change)
        return found

    def _module(self, layer: int, name: str) -> Any:
        return getattr(self._backbone.layers[layer].attention, name)
