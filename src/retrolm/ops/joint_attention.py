"""Attention over several sets of keys under one softmax, where queries stand elsewhere for each set.

Methods that limit distances (LM-Infinite, InfLLM) or move the first tokens (StreamingLLM) rotate a query in another way
for near keys than for far ones. Shape letters: B samples, H query heads, K KV heads, G = H // K, Q queries, S keys of a
set, D head dim; J is 1, K, or (each query head its own) H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


@dataclass(frozen=True)
class KeySet:
    """Rotated queries for a set of keys, its rotated keys and values, and who may attend what (bool).

    `bias_BJS` is added to the logits of the set's keys, behind a softcap: the log of how many tokens a key stands for.
    """

    q_BHQD: Tensor
    k_BKSD: Tensor
    v_BKSD: Tensor
    allowed_BJQS: Tensor
    bias_BJS: Tensor | None = None


def attend_sets(sets: list[KeySet], scale: float, softcap: float | None = None) -> Tensor:
    """Fast path of `attend_sets_reference`, without weights: [B, H, Q, D] in the dtype of the queries.

    Queries and keys of all sets are laid side by side along D with zeros between, so that one dot product serves each
    pair. Keys and values that no query may attend must be finite; a query that may attend nothing gives anything.
    """
    first = sets[0]
    biased = any(one.bias_BJS is not None for one in sets)
    if softcap or (biased and first.q_BHQD.dtype.itemsize < 4):  # the mask, in the queries' dtype, would round a bias
        return attend_sets_reference(sets, scale, softcap)[0]
    B, H, Q, D = first.q_BHQD.shape
    K = first.k_BKSD.shape[1]
    queries = torch.cat([one.q_BHQD for one in sets], -1)
    width = queries.shape[-1]
    keys = [pad(one.k_BKSD, (i * D, width - (i + 1) * D)) for i, one in enumerate(sets)]
    allowed = torch.cat([one.allowed_BJQS for one in sets], -1)
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    bias = torch.zeros(allowed.shape, dtype=queries.dtype, device=queries.device)
    if biased:
        bias = torch.cat([_bias_like(one, queries.dtype) for one in sets], -1)
    bias = bias.masked_fill(~allowed, -torch.inf)
    bias = bias.repeat(1, 1, H // K, 1) if bias.shape[1] in (1, K) else bias.reshape(B, K, (H // K) * Q, -1)
    out = scaled_dot_product_attention(
        queries.reshape(B, K, (H // K) * Q, width),
        torch.cat(keys, 2),
        torch.cat([one.v_BKSD for one in sets], 2),
        attn_mask=bias,
        scale=scale,
    )
    return out.reshape(B, H, Q, D)


def attend_sets_reference(
    sets: list[KeySet], scale: float, softcap: float | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Attention written out, with the weights.

    Returns:
        [B, H, Q, D] in the dtype of the queries, and for each set its weights [B, H, Q, S], float32 or wider. A query
        that may attend nothing gives zeros.
    """
    like = sets[0].q_BHQD
    weights = _joint_scores(sets, scale, softcap).softmax(-1).nan_to_num(0.0)
    split = list(weights.split([one.k_BKSD.shape[2] for one in sets], -1))
    return _weighted(split, sets).to(like.dtype), split


def attend_sets_lse(sets: list[KeySet], scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention with what it takes to merge it with more keys later (`ops.merge_attention`), float32 or wider.

    Returns:
        [B, H, Q, D], zeros for a query that may attend nothing; log-sum-exp of the logits [B, H, Q], -inf for such.
    """
    scores = _joint_scores(sets, scale, softcap)
    weights = scores.softmax(-1).nan_to_num(0.0)
    split = list(weights.split([one.k_BKSD.shape[2] for one in sets], -1))
    return _weighted(split, sets), scores.logsumexp(-1)


def _bias_like(one: KeySet, dtype: torch.dtype) -> Tensor:
    """What is added to the logits, in the shape of what is allowed."""
    if one.bias_BJS is None:
        return torch.zeros(one.allowed_BJQS.shape, dtype=dtype, device=one.allowed_BJQS.device)
    return one.bias_BJS[:, :, None].to(dtype).expand(one.allowed_BJQS.shape)


def _joint_scores(sets: list[KeySet], scale: float, softcap: float | None) -> Tensor:
    """Logits of all sets side by side, [B, H, Q, S], float32 or wider."""
    wide = torch.promote_types(sets[0].q_BHQD.dtype, torch.float32)
    return torch.cat([_scores(one, scale, softcap, wide) for one in sets], -1)


def _weighted(split: list[Tensor], sets: list[KeySet]) -> Tensor:
    """Sum of values by the weights of each set, [B, H, Q, D] in the dtype of the weights."""
    like = sets[0].q_BHQD
    out = torch.zeros_like(like, dtype=split[0].dtype)
    for part, one in zip(split, sets, strict=True):
        grouped = part.unflatten(1, (one.v_BKSD.shape[1], -1)).flatten(2, 3)
        out += (grouped @ one.v_BKSD.to(part.dtype)).reshape(like.shape)
    return out


def _scores(one: KeySet, scale: float, softcap: float | None, wide: torch.dtype) -> Tensor:
    """Logits [B, H, Q, S], -inf where not allowed."""
    K, H = one.k_BKSD.shape[1], one.q_BHQD.shape[1]
    grouped = one.q_BHQD.to(wide).unflatten(1, (K, H // K)).flatten(2, 3)
    scores = (grouped @ one.k_BKSD.to(wide).mT).reshape(*one.q_BHQD.shape[:3], -1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    allowed, bias = one.allowed_BJQS, _bias_like(one, wide)
    if allowed.shape[1] == K:
        allowed, bias = (x.repeat_interleave(H // K, 1) for x in (allowed, bias))
    if one.bias_BJS is not None:
        scores = scores + bias
    return scores.masked_fill(~allowed, -torch.inf)
