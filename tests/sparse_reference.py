"""A text on given page sets the slow way: one dense pass with an explicit position and permission for every pair.

Plain autograd in float64. It borrows the stock model's norms, projections and MLPs, nothing of the engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_reference import _attend, _finish, _project, _window


def reference_losses(model: Any, ids: Tensor, lengths: list[int], sets: dict[int, Tensor]) -> Tensor:
    """Losses of tokens 1, 2, … of `ids` [T].

    Args:
        model: a tiny model whose `rotary_emb` is an `ExactRotary`.
        lengths: tokens of each page. sets: layer → ordinals each page attends before itself [M, S], -1 = none.
    """
    rows = model.get_input_embeddings()(ids)
    for index, layer in enumerate(model.model.layers):
        q, k, v = _project(model, index, layer, rows, len(ids), {})
        distance, allowed = pairs(lengths, sets[index], _window(model.config, index))
        out = _attend(model, index, q, k, v, distance, allowed)
        rows = _finish(layer, rows, out.reshape(len(ids), -1))
    logits = model.lm_head(model.model.norm(rows))
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


def pairs(lengths: list[int], sets: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Distance and permission of every (query, key) pair, [T, T]."""
    starts = [sum(lengths[:page]) for page in range(len(lengths))]
    T = sum(lengths)
    distance = torch.zeros(T, T, dtype=torch.int64)
    allowed = torch.zeros(T, T, dtype=torch.bool)
    for page, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        seen = [
            token
            for other in sets[page].tolist()
            if other >= 0
            for token in range(starts[other], starts[other] + lengths[other])
        ]
        seen += range(start, start + length)
        for number in range(length):
            here = len(seen) - length + number
            for place, token in enumerate(seen[: here + 1]):
                distance[start + number, token] = here - place
                allowed[start + number, token] = window is None or here - place < window
    return distance, allowed
