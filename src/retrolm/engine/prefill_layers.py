"""The layers of Llama-type models over a chunk's rows, on the weights that their modules hold.

What stands between two matrix products takes one kernel instead of several, and the stock rotation by position 0, which
is none, is left out. Projections run as the modules they are, so that hooks on them, such as an adapter's, act as in a
stock forward pass.
Shape letters: B samples, T rows, E hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.prefill_layer import add_rms_norm, silu_times
from .adapter import AdapterHook
from .attachment import Program
from .backbone import Backbone
from .decode_step import foreign_hook, fused_obstacle

_MLP_INNER = 4224 * 14336  # elements of an inner activation held at once: 120 MB in 16 bits


def can_fuse(backbone: Backbone) -> bool:
    """Whether `fused_rows` stands in for the stock decoder: on one device, where nothing else watches the modules."""
    return all(info.device == backbone.device for info in backbone.layers) and is_plain(backbone)


def is_plain(backbone: Backbone) -> bool:
    """Whether the model is nothing but what `fused_rows` computes, an adapter on its projections aside."""
    if fused_obstacle(backbone) is not None or backbone.rope(0).scaling != 1.0:
        return False
    return not foreign_hook(backbone.model, (AdapterHook.__module__,))


def fused_rows(backbone: Backbone, program: Program, rows_BTE: Tensor, wanted: bool) -> Tensor | None:
    """Run `program` (which must be running on the attachment) over embedded rows; they are changed.

    Args:
        wanted: return normed hidden states [B, T, E]; else nothing behind the last layer's attention is computed.
    """
    x, more, last = rows_BTE, None, backbone.num_layers - 1
    for layer, module in enumerate(backbone.decoder.layers):
        attention = module.self_attn
        out = _attention(program, layer, attention, _normed(module.input_layernorm, x, more), backbone.head_dim)
        if layer == last and not wanted:
            return None
        more = _mlp(module.mlp, _normed(module.post_attention_layernorm, x, attention.o_proj(out)))
    return _normed(backbone.decoder.norm, x, more)


def _attention(program: Program, layer: int, attention: Any, normed: Tensor, head_dim: int) -> Tensor:
    projected = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in projected)
    if hasattr(attention, "q_norm"):
        q, k = _normed(attention.q_norm, q, None), _normed(attention.k_norm, k, None)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return program.attend(layer, q, k, v, head_dim**-0.5, None).flatten(2)


def _mlp(mlp: Any, normed: Tensor) -> Tensor:
    """The gated MLP; where there are many rows, some at a time and into the memory of its input.

    An adapter leaves out the bookmarks at the end of all rows, and so must see them at once.
    """
    most = max(1, _MLP_INNER // int(mlp.down_proj.in_features))
    adapted = any(part._forward_hooks for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    if normed.shape[1] <= most or adapted:
        out: Tensor = mlp.down_proj(silu_times(mlp.gate_proj(normed), mlp.up_proj(normed)))
        return out
    for first in range(0, normed.shape[1], most):
        rows = normed[:, first : first + most]
        rows.copy_(mlp.down_proj(silu_times(mlp.gate_proj(rows), mlp.up_proj(rows))))
    return normed


def _normed(module: Any, x: Tensor, more: Tensor | None) -> Tensor:
    return add_rms_norm(x, more, module.weight, module.variance_epsilon)
