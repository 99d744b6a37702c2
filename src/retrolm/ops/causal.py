"""Causal attention over a whole prompt, and the weights it gives, in blocks of rows: never a T × T matrix.

Shape letters: B samples, H query heads, K KV heads, G = H // K, T tokens, Q last tokens of them, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention import attend, bias_from, ungrouped

# Weights held at once: 128 MiB in float32 on an accelerator; on a CPU what its caches hold (four times as fast).
_BLOCK_ELEMENTS = 1 << 25
_CPU_BLOCK_ELEMENTS = 1 << 19


def causal_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of T tokens to themselves and those before them → [B, H, T, D].

    Args:
        softcap: `c * tanh(score / c)` as in Gemma 2. window: only the last `window` tokens are seen, own one included.
    """
    B, H, T, _ = q_BHTD.shape
    if softcap is None and (window is None or window >= T):
        k, v = ungrouped(q_BHTD, k_BKTD, v_BKTD)
        grouped = k.shape[1] != H
        return scaled_dot_product_attention(q_BHTD, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    out = torch.empty_like(q_BHTD)
    for start, end in _row_blocks(T, B * H, q_BHTD.device):
        first = 0 if window is None else max(start - window + 1, 0)
        bias = bias_from(_allowed(start, end, first, window, q_BHTD.device)[None], q_BHTD.dtype).expand(B, -1, -1)
        q, k, v = q_BHTD[:, :, start:end], k_BKTD[:, :, first:end], v_BKTD[:, :, first:end]
        rows = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, scale, softcap)
        out[:, :, start:end] = rows.transpose(1, 2)
    return out


def attention_weights(
    q_BHQD: Tensor, k_BKTD: Tensor, scale: float, softcap: float | None = None, window: int | None = None
) -> Tensor:
    """What each of the last Q tokens gives to each of T, [B, K, G, Q, T], in float32 or wider; rows add up to 1."""
    wide = torch.promote_types(q_BHQD.dtype, torch.float32)
    num_tokens = k_BKTD.shape[2]
    return _weights(q_BHQD.to(wide), k_BKTD.to(wide), num_tokens - q_BHQD.shape[2], scale, softcap, window)


def attention_mass(
    q_BHTD: Tensor, k_BKTD: Tensor, scale: float, softcap: float | None = None, window: int | None = None
) -> Tensor:
    """What each token gets from all T tokens together, [B, K, G, T], in float32 or wider."""
    B, H, T, _ = q_BHTD.shape
    K = k_BKTD.shape[1]
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    keys = k_BKTD.to(wide)
    mass = keys.new_zeros(B, K, H // K, T)
    for start, end in _row_blocks(T, B * H, q_BHTD.device):
        weights = _weights(q_BHTD[:, :, start:end].to(wide), keys[:, :, :end], start, scale, softcap, window)
        mass[..., :end] += weights.sum(3)
    return mass


def mass_on(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    marks: Callable[[int, int], Tensor],
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    first_row: int = 0,
) -> Tensor:
    """What tokens give to those that are marked for them, [M, B, K, G, T − first_row], in float32 or wider.

    Args:
        marks: rows start … end → which of the tokens before `end` are marked, bool [M, end − start, end].
        first_row: rows before it are left out.
    """
    B, H, T, _ = q_BHTD.shape
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    keys, found = k_BKTD.to(wide), []
    for start, end in _row_blocks(T - first_row, B * H, q_BHTD.device):
        start, end = start + first_row, end + first_row
        rows = q_BHTD[:, :, start:end].to(wide)
        weights = _weights(rows, keys[:, :, :end], start, scale, softcap, window)
        found.append(torch.einsum("bkgrt,mrt->mbkgr", weights, marks(start, end).to(wide)))
    return torch.cat(found, -1)


def _weights(
    q_BHQD: Tensor, k_BKTD: Tensor, start: int, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    B, H, Q, D = q_BHQD.shape
    K, T = k_BKTD.shape[1], k_BKTD.shape[2]
    rows = q_BHQD.reshape(B, K, H // K * Q, D)
    scores = (rows @ k_BKTD.transpose(2, 3)).mul_(scale).reshape(B, K, H // K, Q, T)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill_(~_allowed(start, start + Q, 0, window, scores.device, T), -torch.inf).softmax(-1)


def _allowed(
    start: int, end: int, first: int, window: int | None, device: torch.device, stop: int | None = None
) -> Tensor:
    """Which of the tokens first … stop (default `end`) each of the tokens start … end sees, bool [rows, keys]."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, stop or end, device=device)
    return (distance >= 0) & (distance < window) if window is not None else distance >= 0


def _row_blocks(num_rows: int, num_heads: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut rows so that the weights of a block, over all heads of all samples, stay below a fixed size."""
    elements = _CPU_BLOCK_ELEMENTS if device.type == "cpu" else _BLOCK_ELEMENTS
    size = max(elements // (num_heads * num_rows), 1)
    for start in range(0, num_rows, size):
        yield start, min(start + size, num_rows)
