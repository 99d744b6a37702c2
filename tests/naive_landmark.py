"""Landmark Attention by loops, straight from its definition: groups first, then weights, a query at a time."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def naive_weights(logits_S: Tensor, place: int, block: int) -> Tensor:
    """Weights of all places for the query at `place`; the landmark of block b stands at b * block + block - 1."""
    own = place // block
    landmarks = [b * block + block - 1 for b in range(own)]
    current = [s for s in range(own * block, place + 1) if s % block != block - 1]
    first = softmax_over(logits_S, landmarks + current)
    weights = torch.zeros_like(logits_S)
    for s in current:
        weights[s] = first[s]
    for b, landmark in enumerate(landmarks):
        tokens = list(range(b * block, landmark))
        inside = softmax_over(logits_S, tokens)
        for s in tokens:
            weights[s] = inside[s] * first[landmark]
    return weights


def softmax_over(logits_S: Tensor, group: list[int]) -> dict[int, Tensor]:
    """Softmax of one group of places."""
    total = sum(logits_S[s].exp() for s in group)
    return {s: logits_S[s].exp() / total for s in group}


def naive_attention(q_BHQD: Tensor, k_BKQD: Tensor, v_BKQD: Tensor, block: int, scale: float) -> Tensor:
    """Attention of a text to itself, [B, H, Q, D]."""
    B, H, Q, _ = q_BHQD.shape
    group = H // k_BKQD.shape[1]
    rows = []
    for b in range(B):
        for h in range(H):
            keys, values = k_BKQD[b, h // group], v_BKQD[b, h // group]
            for i in range(Q):
                logits = torch.stack([q_BHQD[b, h, i] @ key for key in keys]) * scale
                rows.append(naive_weights(logits, i, block) @ values)
    return torch.stack(rows).view(B, H, Q, -1)


@torch.no_grad()
def naive_model_logits(backbone: Any, ids_T: Tensor, landmark_C: Tensor, num_between: int) -> Tensor:
    """Next-token logits at each place of a text with its landmarks, [S, vocabulary], with loops for attention."""
    rows: list[Tensor] = []
    for t, row in enumerate(backbone.embed(ids_T)):
        rows.append(row)
        if t % num_between == num_between - 1:
            rows.append(landmark_C)
    hooks = NaiveHook(num_between + 1)
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {"naive": hooks}):
        before, backbone.layers[0].attention.config._attn_implementation = (
            backbone.layers[0].attention.config._attn_implementation,
            "naive",
        )
        try:
            logits: Tensor = backbone.model(inputs_embeds=torch.stack(rows)[None], use_cache=False).logits[0]
        finally:
            backbone.layers[0].attention.config._attn_implementation = before
    return logits


class NaiveHook:
    """Stands in for a model's attention function."""

    def __init__(self, block: int) -> None:
        self._block = block

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        return naive_attention(query, key, value, self._block, scaling).transpose(1, 2), None
