"""What a decoder layer of the Llama type does to one token per sample: plain PyTorch, and Triton kernels on CUDA.

Each function rounds where the stock transformers modules round, so that both paths and the stock layers agree.
Shape letters: B samples, E hidden size, N outputs, H query heads, K KV heads, C places of the cache, D head dim,
R = D rotary dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attend, bias_from
from .rotary import rotate


@cache
def kernels() -> Any:
    """The module of Triton kernels, or None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from . import decode_kernels

    return decode_kernels


def _fast(x: Tensor) -> Any:
    """The kernels where they can work on `x`, else None."""
    return kernels() if x.is_cuda and x.dtype != torch.float64 else None


def rms_norm(x_BE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dim, in float32 inside, rounded before the weight is applied."""
    if fast := _fast(x_BE):
        normed: Tensor = fast.rms_norm(x_BE, weight_E, eps)
        return normed
    wide = x_BE.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_E * wide.to(x_BE.dtype)


def project(
    x_BE: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual_BN: Tensor | None = None
) -> Tensor:
    """Linear maps of one input side by side, [B, sum of N], plus `residual_BN` if given.

    One row is a matrix-vector product, which one kernel does for all weights; more rows go through cuBLAS.
    """
    if len(x_BE) == 1 and (fast := _fast(x_BE)):
        out: Tensor = fast.project_row(x_BE, weights, biases, residual_BN)
        return out
    parts = [F.linear(x_BE, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return out if residual_BN is None else residual_BN + out


def gated(x_BE: Tensor, gate: Tensor, up: Tensor, biases: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """silu(gate x) * (up x), [B, N]."""
    if len(x_BE) == 1 and biases == (None, None) and (fast := _fast(x_BE)):
        out: Tensor = fast.gated_row(x_BE, gate, up)
        return out
    return F.silu(F.linear(x_BE, gate, biases[0])) * F.linear(x_BE, up, biases[1])


def place_heads(
    qkv_BN: Tensor,
    cos_BR: Tensor,
    sin_BR: Tensor,
    keys_BKCD: Tensor,
    values_BKCD: Tensor,
    index: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate queries and keys and write keys and values of the new token into the cache.

    Args:
        qkv_BN: outputs of the three projections side by side.
        keys_BKCD, values_BKCD: changed at place `index` (int64 [1]).
        norms: weights [D] of the norms over each query and key head (Qwen3).

    Returns:
        Rotated queries [B, H, D].
    """
    if fast := _fast(qkv_BN):
        placed: Tensor = fast.place_heads(qkv_BN, cos_BR, sin_BR, keys_BKCD, values_BKCD, index, norms, eps)
        return placed
    K, D = keys_BKCD.shape[1], keys_BKCD.shape[3]
    heads_BHD = qkv_BN.unflatten(-1, (-1, D))
    q, k, v = heads_BHD[:, : -2 * K], heads_BHD[:, -2 * K : -K], heads_BHD[:, -K:]
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    cos, sin = cos_BR[:, None], sin_BR[:, None]
    store_token(keys_BKCD, values_BKCD, rotate(k, cos, sin), v, index)
    return rotate(q, cos, sin)


def store_token(keys_BKCD: Tensor, values_BKCD: Tensor, k_BKD: Tensor, v_BKD: Tensor, index: Tensor) -> None:
    """Write one token's keys and values at place `index` (int64 [1])."""
    keys_BKCD.index_copy_(2, index, k_BKD[:, :, None])
    values_BKCD.index_copy_(2, index, v_BKD[:, :, None])


def attend_token(
    q_BHD: Tensor,
    keys_BKCD: Tensor,
    values_BKCD: Tensor,
    starts_B: Tensor,
    index: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of one token per sample over places starts..index of the cache, [B, H, D].

    Args:
        starts_B: first place that holds a token, int64. index: place of the token itself, int64 [1].
        window: only the last `window` places are attended.

    Places outside may hold anything finite. Nothing here waits for the device, so it can be captured in a graph.
    """
    if fast := _fast(q_BHD):
        out: Tensor = fast.attend_token(q_BHD, keys_BKCD, values_BKCD, starts_B, index, scale, softcap, window)
        return out
    place = torch.arange(keys_BKCD.shape[2], device=q_BHD.device)
    allowed = (place >= starts_B[:, None, None]) & (place <= index)
    if window is not None:
        allowed &= index - place < window
    bias = bias_from(allowed, q_BHD.dtype)
    keys, values = keys_BKCD.transpose(1, 2), values_BKCD.transpose(1, 2)
    return attend(q_BHD[:, None], keys, values, bias, scale, softcap)[:, 0]
