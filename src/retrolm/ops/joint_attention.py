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
    D, heads = first.q_BHQD.shape[-1], (first.q_BHQD.shape[1], first.k_BKSD.shape[1])
    queries = torch.cat([one.q_BHQD for one in sets], -1)
    width = queries.shape[-1]
    keys = [pad(one.k_BKSD, (i * D, width - (i + 1) * D)) for i, one in enumerate(sets)]
    bias = joined_bias(queries.dtype, heads, *(one.allowed_BJQS for one in sets))
    if biased:
        bias = bias + in_groups(torch.cat([_bias_like(one, queries.dtype) for one in sets], -1), heads)
    values = torch.cat([one.v_BKSD for one in sets], 2)
    return attend_joined(queries, torch.cat(keys, 2), values, bias, scale)


def joined_bias(dtype: torch.dtype, heads: tuple[int, int], *allowed_BJQS: Tensor) -> Tensor:
    """What `attend_joined` adds to logits for what is allowed of each set: 0, or -inf; [B, 1 or K, G·Q, S].

    A query that may attend nothing is given everything. `heads`: H and K.
    """
    allowed = torch.cat(allowed_BJQS, -1)
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -torch.inf)
    return in_groups(bias, heads)


def in_groups(x_BJQS: Tensor, heads: tuple[int, int]) -> Tensor:
    """What holds for heads as it holds for the queries of each KV head, [B, 1 or K, G·Q, S]."""
    H, K = heads
    if x_BJQS.shape[1] in (1, K):
        return x_BJQS.repeat(1, 1, H // K, 1)
    return x_BJQS.unflatten(1, (K, H // K)).flatten(2, 3)


def attend_joined(q_BHQE: Tensor, k_BKSE: Tensor, v_BKSD: Tensor, bias_BJRS: Tensor, scale: float) -> Tensor:
    """Attention of queries over keys that stand side by side, [B, H, Q, D]; see `attend_sets`."""
    grouped = _grouped(q_BHQE, k_BKSE.shape[1])
    out = scaled_dot_product_attention(grouped, k_BKSE, v_BKSD, attn_mask=bias_BJRS, scale=scale)
    return out.reshape(*q_BHQE.shape[:3], v_BKSD.shape[3])


def weigh_joined(
    q_BHQE: Tensor, k_BKSE: Tensor, v_BKSD: Tensor, bias_BJRS: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`attend_joined` written out, and the weights [B, H, Q, S] in the dtype of the bias, float32 or wider."""
    wide = bias_BJRS.dtype
    scores = _grouped(q_BHQE, k_BKSE.shape[1]).to(wide) @ k_BKSE.to(wide).mT
    if softcap:
        scores, scale = torch.tanh(scores * (scale / softcap)), softcap
    weights = torch.add(bias_BJRS, scores, alpha=scale).softmax(-1)
    out = (weights @ v_BKSD.to(wide)).to(q_BHQE.dtype)
    return out.reshape(*q_BHQE.shape[:3], -1), weights.view(*q_BHQE.shape[:3], -1)


def _grouped(q_BHQE: Tensor, num_kv_heads: int) -> Tensor:
    B, H, Q, E = q_BHQE.shape
    return q_BHQE.reshape(B, num_kv_heads, (H // num_kv_heads) * Q, E)


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
