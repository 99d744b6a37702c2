"""Landmark Attention's inference by loops: one pass of the stock model over a whole text, place by place in each layer.

Keys reach the loops before RoPE (the stock model sees position 0 everywhere), and each query turns what it attends.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from naive_landmark import naive_weights


def naive_passes(num_prompt: int, num_generated: int, num_between: int, chunk: int) -> list[tuple[int, int]]:
    """Places (from, to) that enter together: chunks of the prompt, then each token with the landmark it brings."""

    def place(tokens: int) -> int:
        return tokens + tokens // num_between

    end = place(num_prompt)
    found = [(start, min(start + chunk, end)) for start in range(0, end, chunk)]
    return found + [(place(t), place(t + 1)) for t in range(num_prompt, num_prompt + num_generated)]


class NaiveReading:
    """Stands in for a model's attention function.

    Args:
        passes: of `naive_passes`. retrieval: as the method's knob.
    """

    def __init__(self, rotary: Any, passes: list[tuple[int, int]], block: int, top_k: int, retrieval: str) -> None:
        self.passes, self.block, self.top_k, self.retrieval = passes, block, top_k, retrieval
        self.cos, self.sin = (
            x[0] for x in rotary.forward(torch.zeros(1, dtype=torch.float64), torch.arange(200)[None])
        )

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        out = torch.zeros_like(query)
        group = query.shape[1] // key.shape[1]
        keys, values = key[0].repeat_interleave(group, 0), value[0].repeat_interleave(group, 0)
        for start, end in self.passes:
            chosen = self.choices(query[0], keys, start, end, scaling)
            for h in range(len(keys)):
                for place in range(start, end):
                    blocks = chosen[h][place - start]
                    out[0, h, place] = self.attended(
                        query[0, h, place], keys[h], values[h], start, place, blocks, scaling
                    )
        return out.transpose(1, 2), None

    def num_slots(self, start: int) -> int:
        return min(self.top_k, start // self.block)

    def choices(self, q: Tensor, keys: Tensor, start: int, end: int, scaling: float) -> list[list[list[int]]]:
        """Blocks of each head and each query of a pass."""
        num_past, k = start // self.block, self.num_slots(start)
        scores = torch.zeros(len(keys), end - start, num_past, dtype=q.dtype)
        for h in range(len(keys)):
            for place in range(start, end):
                turned = self.turn(q[h, place], (k + 1) * self.block + place - num_past * self.block)
                for b in range(num_past):
                    slot = 0 if b < num_past - k else b - (num_past - k) + 1
                    landmark = self.turn(keys[h, (b + 1) * self.block - 1], (slot + 1) * self.block - 1)
                    scores[h, place - start, b] = turned @ landmark * scaling
        if self.retrieval != "token":
            scores = scores.softmax(-1).amax(1, keepdim=True).expand_as(scores)
        if self.retrieval == "layer":
            scores = scores.amax(0, keepdim=True).expand_as(scores)
        return [[best(row.tolist(), k) for row in head] for head in scores]

    def attended(
        self, q: Tensor, keys: Tensor, values: Tensor, start: int, place: int, blocks: list[int], scaling: float
    ) -> Tensor:
        """One query's output: chosen blocks in their slots, then the local places."""
        num_past, k = start // self.block, self.num_slots(start)
        logits, rows = [], []
        local = (k + 1) * self.block - num_past * self.block
        turned = self.turn(q, local + place)
        for i, b in enumerate(blocks):
            slot = i + (b >= num_past - k)
            for offset in range(self.block):
                logits.append(turned @ self.turn(keys[b * self.block + offset], slot * self.block + offset) * scaling)
                rows.append(values[b * self.block + offset])
        for s in range(num_past * self.block, place + 1):
            logits.append(turned @ self.turn(keys[s], local + s) * scaling)
            rows.append(values[s])
        return naive_weights(torch.stack(logits), len(logits) - 1, self.block) @ torch.stack(rows)

    def turn(self, x: Tensor, position: int) -> Tensor:
        cos, sin = self.cos[position], self.sin[position]
        width, half = len(cos), len(cos) // 2
        moved = torch.cat([-x[half:width], x[:half]])
        return torch.cat([x[:width] * cos + moved * sin, x[width:]])


def best(scores: list[float], k: int) -> list[int]:
    """The best k, ascending; of equal ones the later."""
    return sorted(sorted(range(len(scores)), key=lambda b: (-scores[b], -b))[:k])


@torch.no_grad()
def naive_logits(
    backbone: Any, landmarks: Any, ids: list[int], num_prompt: int, chunk: int, top_k: int, retrieval: str
) -> Tensor:
    """What follows each token, [T, vocabulary]; the first `num_prompt` were read as a prompt."""
    between, rows, predicting = landmarks.num_between, [], []
    for t, row in enumerate(backbone.embed(torch.tensor(ids))):
        rows.append(row)
        if t % between == between - 1:
            rows.append(landmarks.embedding.to(row))
        predicting.append(len(rows) - 1)
    passes = naive_passes(num_prompt, len(ids) - num_prompt, between, chunk)
    reading = NaiveReading(backbone.decoder.rotary_emb, passes, between + 1, top_k, retrieval)
    config = backbone.layers[0].attention.config
    before = config._attn_implementation
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {"naive": reading}), landmarks.acting(backbone):
        config._attn_implementation = "naive"
        try:
            zeros = torch.zeros(1, len(rows), dtype=torch.int64)
            logits: Tensor = backbone.model(
                inputs_embeds=torch.stack(rows)[None], position_ids=zeros, use_cache=False
            ).logits[0]
        finally:
            config._attn_implementation = before
    return logits[predicting]
