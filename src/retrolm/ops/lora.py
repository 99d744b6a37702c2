"""Linear modules that read the same rows, with LoRA pairs on top: as few matrix products as there are, both ways.

Shape letters: T rows, I input width, O output width, R rank of all pairs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def adapted_linears(
    rows_TI: Tensor,
    weights_OI: Sequence[Tensor],
    biases_O: Sequence[Tensor | None],
    down_RI: Tensor | None,
    ups: Sequence[Tensor | None],
    scale: float,
) -> tuple[Tensor, ...]:
    """`rows @ weight.T + bias + scale * (rows @ down.T) @ up.T` of each module: [T, O] each.

    Differentiable in rows and pairs; weights and biases are taken as constants.

    Args:
        down_RI: the pairs' first halves below each other, in the order of the modules that have one; None = no pairs.
        ups: second halves [O, its ranks]; None where a module has no pair.
    """
    if down_RI is None:
        return tuple(linear(rows_TI, w, b) for w, b in zip(weights_OI, biases_O, strict=True))
    found: tuple[Tensor, ...] = _Adapted.apply(rows_TI, down_RI, scale, weights_OI, biases_O, *ups)
    return found


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        down: Tensor,
        scale: float,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *ups: Tensor | None,
    ) -> tuple[Tensor, ...]:
        low = linear(rows, down)
        outs = [linear(rows, w, b) for w, b in zip(weights, biases, strict=True)]
        for number, columns in _columns(ups):
            outs[number].addmm_(low[:, columns], _there(ups[number]).T, alpha=scale)
        ctx.save_for_backward(rows, down, low, *ups)
        ctx.scale, ctx.weights = scale, weights
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, low, *ups = ctx.saved_tensors
        grad_low = torch.empty_like(low)
        grad_ups: list[Tensor | None] = [None] * len(ups)
        for number, columns in _columns(ups):
            grad = grads[number]
            _scaled_product(grad, _there(ups[number]), ctx.scale, grad_low[:, columns])
            grad_ups[number] = _scaled_product(grad.T, low[:, columns], ctx.scale)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = grad_low @ down
            for grad, weight in zip(grads, ctx.weights, strict=True):
                grad_rows.addmm_(grad, weight)
        return grad_rows, grad_low.T @ rows, None, None, None, *grad_ups


def _columns(ups: Sequence[Tensor | None]) -> list[tuple[int, slice]]:
    """Number of each module that has a pair, and the columns of the low-rank rows that are its own."""
    found, first = [], 0
    for number, up in enumerate(ups):
        if up is not None:
            found.append((number, slice(first, first + up.shape[1])))
            first += up.shape[1]
    return found


def _there(up: Tensor | None) -> Tensor:
    assert up is not None
    return up


def _scaled_product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """`scale * a @ b` in one kernel."""
    return torch.addmm(b.new_empty(()), a, b, beta=0, alpha=scale, out=out)
