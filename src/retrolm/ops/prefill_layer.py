"""What a decoder layer of the Llama type does to many rows besides its matrix products: one pass over memory each.

Plain PyTorch, and Triton kernels on CUDA. Rounded where the stock transformers modules round, so that all three agree.
Shape letters: T rows, E hidden size, N inner size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import launch


def add_rms_norm(x_TE: Tensor, more_TE: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
    """Add `more` to `x` in place, if given; return its root-mean-square norm times `weight`."""
    if launch.runs_on(x_TE) and x_TE.dtype != torch.float64:
        from .prefill_layer_kernel import add_rms_norm as at_once

        found: Tensor = at_once(x_TE, more_TE, weight_E, eps)
        return found
    if more_TE is not None:
        x_TE += more_TE
    wide = x_TE.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x_TE.dtype).mul_(weight_E)


def silu_times(gate_TN: Tensor, up_TN: Tensor) -> Tensor:
    """silu(gate) * up, written into `gate`."""
    if launch.runs_on(gate_TN) and gate_TN.dtype != torch.float64:
        from .prefill_layer_kernel import silu_times as at_once

        found: Tensor = at_once(gate_TN, up_TN)
        return found
    return F.silu(gate_TN, inplace=True).mul_(up_TN)
