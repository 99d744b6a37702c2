"""The layers of Llama-type models over bookmark rows, with gradients: few kernels, since launching them is what costs.

As in `prefill_layers` there is no rotation by position 0, which is none; norms are one kernel each way.
Projections run as the modules they are, so that hooks on them act as in a stock forward pass.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .attachment import Program
from .backbone import Backbone


def stream_rows(backbone: Backbone, program: Program, rows_BME: Tensor) -> None:
    """Run `program` (which must be running on the attachment) over embedded rows; see `prefill_layers.is_plain`."""
    x = rows_BME
    for layer, module in enumerate(backbone.decoder.layers):
        attention, mlp = module.self_attn, module.mlp
        out = _attention(program, layer, attention, _normed(module.input_layernorm, x), backbone.head_dim)
        x = x + attention.o_proj(out)
        normed = _normed(module.post_attention_layernorm, x)
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def _attention(program: Program, layer: int, attention: Any, normed: Tensor, head_dim: int) -> Tensor:
    projected = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in projected)
    if hasattr(attention, "q_norm"):
        q, k = _normed(attention.q_norm, q), _normed(attention.k_norm, k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return program.attend(layer, q, k, v, head_dim**-0.5, None).flatten(2)


def _normed(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
