"""Attention of the tokens of one page over a gathered set, with grouped-query heads left unexpanded.

Shape letters: N pages, Q query tokens, T key tokens, H query heads, K KV heads, G = H // K, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


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
) -> Tensor:
    """Fast path of `attend_reference` through `scaled_dot_product_attention`.

    Queries of one KV head's group are laid behind each other so that keys and values need no copies. Keys and
    values that no query may attend must be finite.

    Args:
        bias_NQT: 0 where a query may attend, -inf where not (see `bias_from`); None = everything.
        causal: the last Q keys are the queries' own tokens, in order; then `bias_NQT` must be None.
    """
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


def _attend_causal(q_NQHD: Tensor, k_NTKD: Tensor, v_NTKD: Tensor, scale: float) -> Tensor:
    mask = causal_lower_right(q_NQHD.shape[1], k_NTKD.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q_NQHD, k_NTKD, v_NTKD))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _allowed(q_NQHD: Tensor, k_NTKD: Tensor, bias_NQT: Tensor | None, causal: bool) -> Tensor:
    if bias_NQT is not None:
        return bias_NQT == 0
    num_queries, num_keys = q_NQHD.shape[1], k_NTKD.shape[1]
    allowed = torch.ones(1, num_queries, num_keys, dtype=torch.bool, device=q_NQHD.device)
    return allowed.tril(num_keys - num_queries) if causal else allowed
