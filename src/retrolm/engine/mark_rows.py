"""Bookmark rows of a whole text beside its normal rows, layer by layer and without gradients, by few kernels.

As in a stock forward pass they choose the pages of each layer, and go past every adapter: through the backbone's
weights themselves. Shape letters: M bookmarks, E hidden size, T tokens, W page size, H, K, D heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..ops.prefill_layer import add_rms_norm, silu_times
from .backbone import Backbone
from .layer_call import LayerCall
from .sparse_pass import SparseProgram


class MarkRows:
    """The bookmarks of one text; `step` brings them one layer on. There may be none.

    Args:
        rows_ME: their embeddings.
    """

    def __init__(self, backbone: Backbone, program: SparseProgram, rows_ME: Tensor) -> None:
        self._backbone, self._program = backbone, program
        self._x = rows_ME.detach().to(backbone.dtype).clone()
        self._more: Tensor | None = None
        self._layer = 0

    @torch.no_grad()
    def step(self, layer: int, q: Tensor, pages: tuple[Tensor, Tensor]) -> None:
        """Choose a layer's pages where they aren't chosen yet, and compute the layer; nothing if that has been done.

        Args:
            q: of normal tokens [T, H, D]. pages: their keys and values [M, W, K, D]; all before RoPE.
        """
        if layer < self._layer:
            return
        self._layer = layer + 1
        module: Any = self._backbone.decoder.layers[layer]
        if not len(self._x):
            self._choose(layer, q, pages[0], (self._x, self._x), self._x)
            return
        normed = self._normed(module.input_layernorm)
        marks, content = self._projected(layer, module.self_attn, normed)
        self._choose(layer, q, pages[0], (marks[0], content), marks[1])
        if self._layer < self._backbone.num_layers:
            call = LayerCall(layer, self._backbone.head_dim**-0.5, None)
            self._finish(module, self._program.attend_bookmarks(call, marks, pages))

    def _choose(self, layer: int, q: Tensor, keys: Tensor, marks: tuple[Tensor, Tensor], mark_keys: Tensor) -> None:
        if layer not in self._program.chosen:
            self._program.choose(layer, q, keys, marks, mark_keys)

    def _finish(self, module: Any, out_MHD: Tensor) -> None:
        """What follows attention; the residual of the MLP is added with the next norm."""
        attention, mlp = module.self_attn, module.mlp
        self._more = linear(out_MHD.flatten(1), attention.o_proj.weight, attention.o_proj.bias)
        normed = self._normed(module.post_attention_layernorm)
        gate, up = (linear(normed, part.weight, part.bias) for part in (mlp.gate_proj, mlp.up_proj))
        self._more = linear(silu_times(gate, up), mlp.down_proj.weight, mlp.down_proj.bias)

    def _normed(self, norm: Any) -> Tensor:
        return add_rms_norm(self._x, self._more, norm.weight, norm.variance_epsilon)

    def _projected(self, layer: int, attention: Any, normed: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Queries, keys and values [M, heads, D], and keys without the constant bias."""
        found = {}
        for name in ("q_proj", "k_proj", "v_proj"):
            part = getattr(attention, name)
            delta = self._delta(layer, name, normed)
            out = linear(normed, part.weight, part.bias)
            content = self._backbone.content_keys(layer, normed, out) if name == "k_proj" else None
            for rows in (out, content):
                if rows is not None and delta is not None:
                    rows += delta
            found[name] = out
            if name == "k_proj":
                found["content"] = out if content is None else content
        heads = {name: x.unflatten(1, (-1, self._backbone.head_dim)) for name, x in found.items()}
        if hasattr(attention, "q_norm"):
            heads["q_proj"], heads["k_proj"] = (
                add_rms_norm(heads[name], None, norm.weight, norm.variance_epsilon)
                for name, norm in (("q_proj", attention.q_norm), ("k_proj", attention.k_norm))
            )
            heads["content"] = heads["k_proj"]
        return (heads["q_proj"], heads["k_proj"], heads["v_proj"]), heads["content"]

    def _delta(self, layer: int, name: str, normed: Tensor) -> Tensor | None:
        retriever = self._program.retriever
        return None if retriever is None else retriever.delta(layer, name, normed).to(normed.dtype)
