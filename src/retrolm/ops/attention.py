"""Attention of the tokens of one page over a gathered set, with grouped-query heads left unexpanded.

Shape letters: N pages, Q query tokens, T key tokens, H query heads, K KV heads, G = H // K, D head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

# What `scaled_dot_product_attention` runs on a CPU; called by its own name because it also returns the log-sum-exp.
CPU_KERNEL: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
SPLIT_DTYPES = (torch.float32, torch.float64)


def shapes_may_vary(device: torch.device) -> AbstractContextManager[None]:
    """A block whose attention takes no kernel that is built anew for every shape.

    On newer GPUs PyTorch prefers cuDNN, which plans each new length for a tenth of a second or more: worth it where
    shapes repeat, but batches of training hardly ever have the same.
    """
    if device.type != "cuda":
        return nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    block: AbstractContextManager[None] = sdpa_kernel(kernels)
    return block


def attend_reference(
    q_NQHD: Tensor,
    k_NTKD: Tensor,
    v_NTKD: Tensor,
    allowed_NQT: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention written out; the truth that the fast path is tested against.

    Args:
        q_NQHD: rotated queries. k_NTKD, v_NTKD: rotated keys, values.
        allowed_NQT: bool, True where a query may attend; broadcastable. A query that may attend nothing gives zeros.
        softcap: `c * tanh(score / c)` as in Gemma 2.

    Returns:
        [N, Q, H, D] in the dtype of `q_NQHD`; scores and softmax are computed in float32 or wider.
    """
    N, Q, H, D = q_NQHD.shape
    K = k_NTKD.shape[2]
    wide = torch.promote_types(q_NQHD.dtype, torch.float32)
    q_NQKGD = q_NQHD.reshape(N, Q, K, H // K, D)
    scores = torch.einsum("nqkgd,ntkd->nkgqt", q_NQKGD.to(wide), k_NTKD.to(wide)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    blocked = ~allowed_NQT[:, None, None]
    weights = scores.masked_fill(blocked, -torch.inf).softmax(-1).nan_to_num(0.0)
    values = v_NTKD.to(wide).masked_fill(~allowed_NQT.any(1)[..., None, None], 0.0)
    out = torch.einsum("nkgqt,ntkd->nqkgd", weights, values)
    return out.reshape(N, Q, H, D).to(q_NQHD.dtype)


def attend(
    q_NQHD: Tensor,
    k_NTKD: Tensor,
    v_NTKD: Tensor,
    bias_NQT: Tensor | None,
    scale: float,
    softcap: float | None = None,
    causal: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Fast path of `attend_reference` through `scaled_dot_product_attention`.

    Queries of one KV head's group are laid behind each other so that keys and values need no copies. Keys and
    values that no query may attend must be finite.

    Args:
        q_NQHD, k_NTKD, v_NTKD: fastest on a CPU if they are views of [N, H or K, tokens, D] (see `head_major`).
        bias_NQT: 0 where a query may attend, -inf where not (see `bias_from`); None = everything.
        causal: the last Q keys are the queries' own tokens, in order; then `bias_NQT` must be None.
        out: where to write the result [N, Q, H, D], in any layout.
    """
    if causal and not softcap and _splits(q_NQHD, k_NTKD, v_NTKD):
        return _attend_split(q_NQHD, k_NTKD, v_NTKD, scale, torch.empty_like(q_NQHD) if out is None else out)
    found = _attend_at_once(q_NQHD, k_NTKD, v_NTKD, bias_NQT, scale, softcap, causal)
    return found if out is None else out.copy_(found)


def _attend_at_once(
    q_NQHD: Tensor,
    k_NTKD: Tensor,
    v_NTKD: Tensor,
    bias_NQT: Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool,
) -> Tensor:
    if softcap:
        allowed = _allowed(q_NQHD, k_NTKD, bias_NQT, causal)
        return attend_reference(q_NQHD, k_NTKD, v_NTKD, allowed, scale, softcap)
    if causal and q_NQHD.is_cuda:
        return _attend_causal(q_NQHD, k_NTKD, v_NTKD, scale)
    if causal:
        bias_NQT = bias_from(_allowed(q_NQHD, k_NTKD, None, True), q_NQHD.dtype)
    N, Q, H, D = q_NQHD.shape
    K = k_NTKD.shape[2]
    q = q_NQHD.reshape(N, Q, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(N, K, (H // K) * Q, D)
    mask = None if bias_NQT is None else bias_NQT.repeat(1, H // K, 1).unsqueeze(1)
    out = scaled_dot_product_attention(q, k_NTKD.transpose(1, 2), v_NTKD.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.reshape(N, K, H // K, Q, D).permute(0, 3, 1, 2, 4).reshape(N, Q, H, D)


def bias_from(allowed_NQT: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask (True = may attend) into the additive one that `attend` takes."""
    return torch.zeros(allowed_NQT.shape, dtype=dtype, device=allowed_NQT.device).masked_fill(~allowed_NQT, -torch.inf)


def causal_needs_no_mask(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend(causal=True)` works without building a mask there."""
    return device.type == "cuda" or (CPU_KERNEL is not None and dtype in SPLIT_DTYPES)


def head_major(like_NTHD: Tensor) -> Tensor:
    """An empty tensor of the shape of `like_NTHD` in the memory order in which attention reads it fastest.

    On a CPU that is [N, H, T, D]: one head's rows lie behind each other. A GPU's kernels want none but [N, T, H, D].
    """
    N, T, H, D = like_NTHD.shape
    if like_NTHD.is_cuda:
        return like_NTHD.new_empty(N, T, H, D)
    return like_NTHD.new_empty(N, H, T, D).transpose(1, 2)


def _attend_causal(q_NQHD: Tensor, k_NTKD: Tensor, v_NTKD: Tensor, scale: float) -> Tensor:
    mask = causal_lower_right(q_NQHD.shape[1], k_NTKD.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q_NQHD, k_NTKD, v_NTKD))
    k, v = ungrouped(q, k, v)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def ungrouped(q_NHQD: Tensor, k_NKTD: Tensor, v_NKTD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as CUDA's kernels want them: per query head in float32, where no kernel knows groups.

    With `enable_gqa` PyTorch would fall back to a Q × T matrix of weights per head.
    """
    group = q_NHQD.shape[1] // k_NKTD.shape[1]
    if group == 1 or not q_NHQD.is_cuda or q_NHQD.dtype in (torch.float16, torch.bfloat16):
        return k_NKTD, v_NKTD
    return k_NKTD.repeat_interleave(group, 1), v_NKTD.repeat_interleave(group, 1)


def _splits(*parts: Tensor) -> bool:
    """Whether own and earlier keys can be attended apart: the kernel gives no gradient for what joins them."""
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in parts)
    return CPU_KERNEL is not None and not parts[0].is_cuda and parts[0].dtype in SPLIT_DTYPES and not wants_grad


def _attend_split(q_NQHD: Tensor, k_NTKD: Tensor, v_NTKD: Tensor, scale: float, out: Tensor) -> Tensor:
    """Own tokens causally, earlier ones without a mask, joined by how much weight falls on each.

    A mask of additions over all keys costs a sixth of the time of attention itself.
    """
    Q, K = q_NQHD.shape[1], k_NTKD.shape[2]
    num_before = k_NTKD.shape[1] - Q
    q, k, v = (x.transpose(1, 2) for x in (q_NQHD, k_NTKD, v_NTKD))
    own, own_lse = CPU_KERNEL(q, k[:, :, num_before:], v[:, :, num_before:], 0.0, True, scale=scale)
    if num_before == 0:
        return out.copy_(own.transpose(1, 2))
    grouped = q.unflatten(1, (K, -1)).flatten(2, 3)
    before, lse = CPU_KERNEL(grouped, k[:, :, :num_before], v[:, :, :num_before], 0.0, False, scale=scale)
    before, lse = before.unflatten(2, (-1, Q)), lse.unflatten(2, (-1, Q))
    own, own_lse = own.unflatten(1, (K, -1)), own_lse.unflatten(1, (K, -1))
    share = torch.sigmoid(own_lse - lse)[..., None]
    torch.lerp(before, own, share, out=out.transpose(1, 2).unflatten(1, (K, -1)))
    return out


def _allowed(q_NQHD: Tensor, k_NTKD: Tensor, bias_NQT: Tensor | None, causal: bool) -> Tensor:
    if bias_NQT is not None:
        return bias_NQT == 0
    num_queries, num_keys = q_NQHD.shape[1], k_NTKD.shape[1]
    allowed = torch.ones(1, num_queries, num_keys, dtype=torch.bool, device=q_NQHD.device)
    return allowed.tril(num_keys - num_queries) if causal else allowed
