"""Cross-entropy of a language model's head, a chunk of tokens at a time: the logits of a text never exist together.

Shape letters: T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def chunked_cross_entropy(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    labels_T: Tensor,
    chunk: int = 1024,
    softcap: float | None = None,
) -> Tensor:
    """Negative log-likelihood of each label, [T], in float32 or wider; gradients are made in the forward pass.

    Args:
        hidden_TC: rows that the head reads. weight_VC: the head's weight (no bias).
        labels_T: int64. chunk: tokens whose logits exist at once.
        softcap: `c * tanh(logit / c)` as in Gemma 2.

    The gradient that comes back must be the same for every token (a sum or a mean of the result): that is what lets
    each chunk's logits be dropped at once. Anything else raises `ValueError`.
    """
    losses: Tensor = _ChunkedCrossEntropy.apply(hidden_TC, weight_VC, labels_T, chunk, softcap)
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TC: Tensor, weight_VC: Tensor, labels_T: Tensor, chunk: int, softcap: float | None
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight = weight_VC.to(hidden_TC.dtype)
        wide = torch.promote_types(hidden_TC.dtype, torch.float32)
        losses = torch.empty(len(labels_T), dtype=wide, device=hidden_TC.device)
        grad_hidden = torch.empty_like(hidden_TC) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_VC) if wants_weight else None
        for start in range(0, len(labels_T), chunk):
            rows = slice(start, start + chunk)
            losses[rows], grad = _chunk(hidden_TC[rows], weight, labels_T[rows], softcap, wants_hidden or wants_weight)
            if grad is not None and grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad is not None and grad_weight is not None:
                grad_weight += (grad.T @ hidden_TC[rows]).to(grad_weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scale_T = grads[0]
        if _differs(scale_T):
            raise ValueError("chunked_cross_entropy takes the same gradient for every token (sum or mean)")
        found = [None if g is None else g * scale_T[0].to(g.dtype) for g in ctx.saved_tensors]
        return found[0], found[1], None, None, None


def _differs(scale_T: Tensor) -> bool:
    """Whether tokens' gradients differ. That of a sum is one number seen many times, which nobody has to look at."""
    return scale_T.stride() != (0,) and bool((scale_T != scale_T[:1]).any())


def _chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses of some tokens and the gradient of their sum in the logits, in the dtype of `hidden`."""
    logits = hidden @ weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    if softcap:
        logits = softcap * torch.tanh(logits.to(wide) / softcap)
    # Widened while it is read: a GPU writes no copy of the logits, the largest tensor of a step, for that.
    log_shares = logits.log_softmax(1, dtype=wide)
    losses_T1 = -log_shares.gather(1, labels[:, None])
    if not with_grad:
        return losses_T1[:, 0], None
    # Rounded while it is written; the labels' own are set apart, since a share near 1 would lose what is left to it.
    grad = torch.exp(log_shares, out=torch.empty_like(log_shares, dtype=hidden.dtype))
    grad.scatter_(1, labels[:, None], torch.expm1(-losses_T1).to(grad.dtype))
    if softcap:
        grad *= 1 - (logits / softcap) ** 2
    return losses_T1[:, 0], grad
