"""Between tensors and the arrays of base files. bfloat16 travels as its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..store import PageLayout
from .shard import RecordShape

NAME_OF = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


def to_array(x: Tensor) -> tuple[str, NDArray[Any]]:
    """Dtype, as safetensors names it, and values of a floating-point tensor."""
    x = x.detach().cpu().contiguous()
    bits: NDArray[Any] = x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()
    return NAME_OF[x.dtype], bits


def to_tensor(dtype: str, values: NDArray[Any]) -> Tensor:
    """The tensor of such an array, sharing its memory."""
    if dtype == "BF16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def record_shape(layout: PageLayout) -> RecordShape:
    """How pages of this layout are stored."""
    return RecordShape(NAME_OF[layout.stored_dtype], layout.num_layers, layout.stored_shape)


def record_bytes(first: Tensor, second: Tensor) -> bytes:
    """Records, one after the other, of stored pages with these halves [N, *half]."""
    return torch.stack([first, second], 1).cpu().contiguous().view(torch.uint8).numpy().tobytes()
