"""Grouped softmax of Landmark Attention (arXiv 2305.16300): a block's tokens share the weight of its landmark.

A text's places come in blocks of `block` places: normal tokens and, at the last place, the block's landmark. A query
takes a softmax over its own block's normal tokens so far and the landmarks of complete earlier blocks; what a landmark
gets there is shared by a softmax over its block's normal tokens. Landmarks themselves weigh nothing, so that a landmark
is never among what its own query attends.

Shape letters: B samples, H query heads, K KV heads, G query heads per KV head, Q queries, S places, P blocks, D head
dim; H = K·G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def grouped_softmax(logits: Tensor, places: Tensor, block: int) -> Tensor:
    """Weights of places 0 to S - 1; they sum to 1 over a query's row.

    Args:
        logits: [..., Q, S], any value at places that come after the query. places: of the queries, int64 [Q].
        block: places of a block, its landmark included; at least 2.

    Returns:
        [..., Q, S] in the dtype of `logits`; 0 at landmarks and at places after the query's.
    """
    num_places = logits.shape[-1]
    blocks = pad(logits, (0, -num_places % block)).unflatten(-1, (-1, block))
    # A block's weights are p0(landmark) · p_b(token): one softmax over all tokens does that, if each block's logits
    # are shifted so that their log-sum-exp is the landmark's logit.
    shift = blocks[..., -1] - blocks[..., :-1].logsumexp(-1)
    shift = shift.masked_fill(~_earlier_blocks(places, block, blocks.shape[-2]), 0.0)
    shifted = (blocks + shift[..., None]).flatten(-2)[..., :num_places]
    return shifted.masked_fill(~_attended(places, block, num_places), -torch.inf).softmax(-1)


def grouped_attention(q_BHQD: Tensor, k_BKQD: Tensor, v_BKQD: Tensor, block: int, scale: float) -> Tensor:
    """Attention of a whole text to itself, from place 0 on; queries and keys after RoPE.

    Returns:
        [B, H, Q, D] in the dtype of `q_BHQD`; differentiable. The softmax is in float32 or wider.
    """
    num_kv = k_BKQD.shape[1]
    out: Tensor = _Grouped.apply(q_BHQD.unflatten(1, (num_kv, -1)), k_BKQD, v_BKQD, block, scale)
    return out.flatten(1, 2)


class _Grouped(torch.autograd.Function):
    """Keeps the weights alone, in the inputs' dtype: a text's logits exist once, in float32, while they are made."""

    @staticmethod
    def forward(ctx: Any, q_BKGQD: Tensor, k_BKQD: Tensor, v_BKQD: Tensor, block: int, scale: float) -> Tensor:
        places = torch.arange(q_BKGQD.shape[3], device=q_BKGQD.device)
        logits = (q_BKGQD * scale) @ k_BKQD[:, :, None].mT
        weights = grouped_softmax(_wide(logits), places, block).to(q_BKGQD.dtype)
        ctx.save_for_backward(q_BKGQD, k_BKQD, v_BKQD, weights)
        ctx.block, ctx.scale = block, scale
        return weights @ v_BKQD[:, :, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        out = grads[0]
        grad = (_logit_grads(weights, out @ v[:, :, None].mT, ctx.block) * ctx.scale).to(q.dtype)
        grad_k = (grad.mT @ q).sum(2)
        return grad @ k[:, :, None], grad_k, (weights.mT @ out).sum(2), None, None


def _logit_grads(weights: Tensor, grads: Tensor, block: int) -> Tensor:
    """Gradients of logits [..., Q, S] from those of the weights: of the softmax over shifted logits, then of shifts."""
    num_places = weights.shape[-1]
    wide = _wide(weights)
    shifted = wide * (_wide(grads) - (wide * grads).sum(-1, keepdim=True))
    blocks, shares = (pad(x, (0, -num_places % block)).unflatten(-1, (-1, block)) for x in (shifted, wide))
    places = torch.arange(num_places, device=weights.device)
    earlier = _earlier_blocks(places, block, blocks.shape[-2])
    of_shift = blocks.sum(-1, keepdim=True).masked_fill(~earlier[..., None], 0.0)
    # A block that has no weight left has no gradient either.
    inside = shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    found = blocks - of_shift * inside
    found[..., -1:] = of_shift
    return found.flatten(-2)[..., :num_places]


def _earlier_blocks(places: Tensor, block: int, num_blocks: int) -> Tensor:
    """Which blocks lie before each query's own, bool [Q, P]."""
    return torch.arange(num_blocks, device=places.device) < (places // block)[:, None]


def _attended(places: Tensor, block: int, num_places: int) -> Tensor:
    """Normal places that don't come after each query, bool [Q, S]."""
    at = torch.arange(num_places, device=places.device)
    return (at <= places[:, None]) & (at % block != block - 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
