"""How much a loss would change if a page weighed more in the softmax: what training by chosen pages learns from.

Attention with `score_p` added to the logits of page p's tokens has this gradient in `score_p`, taken here at 0, where
the attention is the plain one. Choosing pages has no gradient of its own.
Shape letters: n gathering pages, Q query tokens, L gathered tokens, S slots, W page size, H, K, D heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_WEIGHTS = 1 << 26  # attention weights that exist at once


def with_pull(
    out_nQHD: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    bias_nQL: Tensor | None,
    scale: float,
    softcap: float | None,
    slots: tuple[int, int, int],
    note: Callable[[Tensor], None],
) -> Tensor:
    """`out_nQHD` itself; its backward pass tells what scores of its slots would have got.

    Args:
        qkv: what `attention.attend` made `out_nQHD` of. bias_nQL: its mask, broadcastable; None = causal, the last Q
            keys being the queries' own. scale, softcap: its own; a page's score is added behind the cap.
        slots: S, W and the place of the first gathered token in its slot.
        note: called with the gradients of the slots' scores, float32 or wider [n, S].
    """
    found: Tensor = _Pull.apply(out_nQHD, *(x.detach() for x in qkv), bias_nQL, (scale, softcap, slots), note)
    return found


class _Pull(torch.autograd.Function):
    """The inputs are saved as attention saves them, so under checkpointing they are dropped and made again."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, how: Any, note: Any
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.bias, ctx.how, ctx.note = bias, how, note
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        scale, softcap, slots = ctx.how
        bias = _causal_bias(q.shape[1], k.shape[1], q.device) if ctx.bias is None else ctx.bias
        bias = bias.expand(len(q), -1, -1)
        step = max(1, _MOST_WEIGHTS // (q.shape[1] * q.shape[2] * k.shape[1]))
        parts = zip(*(x.split(step) for x in (grad, q, k, v, bias)), strict=True)
        each = [_of_tokens(g, q, k, v, b, scale, softcap) for g, q, k, v, b in parts]
        ctx.note(_by_slot(torch.cat(each), slots))
        return grad, None, None, None, None, None, None


def _of_tokens(
    grad_nQHD: Tensor,
    q_nQHD: Tensor,
    k_nLKD: Tensor,
    v_nLKD: Tensor,
    bias_nQL: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Gradients of the logits, summed over queries and heads, [n, L]."""
    wide = torch.promote_types(q_nQHD.dtype, torch.float32)
    q, grad = (_grouped(x.to(wide), k_nLKD.shape[2]) for x in (q_nQHD, grad_nQHD))
    k, v = (x.to(wide).transpose(1, 2) for x in (k_nLKD, v_nLKD))
    logits = q @ k.transpose(2, 3) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    group = q_nQHD.shape[2] // k_nLKD.shape[2]
    weights = (logits + bias_nQL.to(wide).repeat(1, group, 1)[:, None]).softmax(-1)
    pulls = weights * (grad @ v.transpose(2, 3))
    return (pulls - weights * pulls.sum(-1, keepdim=True)).sum((1, 2))


def _grouped(x_nQHD: Tensor, num_groups: int) -> Tensor:
    """The queries of one KV head's group behind each other, [n, K, H / K * Q, D]."""
    return x_nQHD.unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _by_slot(each_nL: Tensor, slots: tuple[int, int, int]) -> Tensor:
    """Sums over the tokens of each slot, [n, S]."""
    S, W, first = slots
    return F.pad(each_nL, (first, S * W - first - each_nL.shape[1])).unflatten(1, (S, W)).sum(2)


def _causal_bias(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Additive mask [1, Q, L] of queries that stand at the end of the keys."""
    allowed = torch.ones(1, num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return torch.zeros(allowed.shape, device=device).masked_fill(~allowed, -torch.inf)
