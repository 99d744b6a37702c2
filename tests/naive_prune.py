"""Pruning after a dense prefill the slow way: attention matrices written out, scores in loops, everything in float64.

It borrows the stock model's layers and its attention hook, nothing of the engine or of the methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

Sees = Callable[[int, int, int, int], bool]  # (layer, query head, row, key) → may attend
Shift = Callable[[int, int, int, int], int]  # the same → how much further on the key stands for that row


def slow_forward(
    model: Any, ids: list[int], sees: Sees, shift: Shift | None = None
) -> tuple[Tensor, list[list[list[list[float]]]]]:
    """Logits [T, vocabulary] where each row attends what `sees` says, and the weights [layer][head][row][key]."""
    weights: list[Any] = [None] * model.config.num_hidden_layers

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
        layer, softcap = module.layer_idx, rest.get("softcap")
        H, T, D = q.shape[1:]
        group = H // k.shape[1]
        out = torch.zeros(1, T, H, D, dtype=torch.float64)
        weights[layer] = [[[0.0] * T for _ in range(T)] for _ in range(H)]
        for head in range(H):
            keys, values = k[0, head // group], v[0, head // group]
            for row in range(T):
                seen = [key for key in range(row + 1) if sees(layer, head, row, key)]
                turned = keys[seen]
                for place, key in enumerate(seen if shift else ()):
                    if by := shift(layer, head, row, key):  # type: ignore[misc]
                        turned[place] = _turned(model, keys[key], by)
                scores = turned @ q[0, head, row] * scaling
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                parts = torch.exp(scores - scores.max())
                parts /= parts.sum()
                out[0, row, head] = parts @ values[seen]
                for key, part in zip(seen, parts.tolist(), strict=True):
                    weights[layer][head][row][key] = part
        return out, None

    with _attending(model, attention), torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits, weights


def _turned(model: Any, key: Tensor, by: int) -> Tensor:
    """A rotated key, turned on by `by` positions (default RoPE, all dims rotary)."""
    frequencies, _ = model.model.rotary_emb.frequencies()
    half, out = len(key) // 2, key.clone()
    for i in range(half):
        cos, sin = math.cos(by * float(frequencies[i])), math.sin(by * float(frequencies[i]))
        out[i] = key[i] * cos - key[half + i] * sin
        out[half + i] = key[half + i] * cos + key[i] * sin
    return out


@contextmanager
def _attending(model: Any, function: Any) -> Iterator[None]:
    config, before = model.config, model.config._attn_implementation
    AttentionInterface.register("slow_prune_oracle", function)
    config._attn_implementation = "slow_prune_oracle"
    try:
        yield
    finally:
        config._attn_implementation = before


def in_window(model: Any) -> Sees:
    """What a row may see without pruning: all before it, or its layer's sliding window."""

    def sees(layer: int, head: int, row: int, key: int) -> bool:
        window = model.model.layers[layer].self_attn.config.sliding_window if slides(model, layer) else None
        return window is None or row - key < window

    return sees


def slides(model: Any, layer: int) -> bool:
    """Whether a layer keeps a sliding window."""
    types = getattr(model.config, "layer_types", None)
    return bool(types and types[layer] == "sliding_attention")


def top(scores: list[float], count: int) -> set[int]:
    """Places of the best scores; of equal ones the later."""
    return set(sorted(range(len(scores)), key=lambda place: (scores[place], place))[len(scores) - count :])


def pooled(scores: list[float], size: int, mean: bool) -> list[float]:
    """Each score joined with its neighbours; the mean counts zeros beyond the ends."""
    out = []
    for place in range(len(scores)):
        near = scores[max(place - size // 2, 0) : place + size // 2 + 1]
        out.append(sum(near) / size if mean else max(near))
    return out


def snapkv_places(
    weights: list[list[list[float]]], num_kv_heads: int, count: int, window: int, size: int, mean_pool: bool, group: str
) -> list[set[int]]:
    """SnapKV's tokens of one layer, per KV head, from the layer's attention matrix."""
    T, num_group = len(weights[0]), len(weights) // num_kv_heads
    found = []
    for kv_head in range(num_kv_heads):
        rows = []
        for head in range(kv_head * num_group, (kv_head + 1) * num_group):
            sums = [sum(weights[head][row][key] for row in range(T - window, T)) for key in range(T - window)]
            rows.append(pooled(sums, size, mean_pool))
        joined = [_joined([row[key] for row in rows], group) for key in range(T - window)]
        found.append(top(joined, count - window) | set(range(T - window, T)))
    return found


def h2o_places(
    weights: list[list[list[float]]], num_kv_heads: int, count: int, recent: int, normalise: bool, group: str
) -> list[set[int]]:
    """H2O's tokens of one layer, per KV head."""
    T, num_group = len(weights[0]), len(weights) // num_kv_heads
    found = []
    for kv_head in range(num_kv_heads):
        scores = []
        for key in range(T - recent):
            heads = range(kv_head * num_group, (kv_head + 1) * num_group)
            sums = [sum(weights[head][row][key] for row in range(T)) for head in heads]
            scores.append(_joined(sums, group) / (T - key if normalise else 1))
        found.append(top(scores, count - recent) | set(range(T - recent, T)))
    return found


def tova_places(weights: list[list[list[float]]], num_kv_heads: int, count: int) -> list[set[int]]:
    """TOVA's tokens of one layer: the same for all KV heads."""
    T = len(weights[0])
    scores = [sum(head[T - 1][key] for head in weights) / len(weights) for key in range(T - 1)]
    return [top(scores, count - 1) | {T - 1}] * num_kv_heads


def streaming_places(num_tokens: int, num_kv_heads: int, count: int, sinks: int) -> list[set[int]]:
    """First and last tokens."""
    return [set(range(sinks)) | set(range(num_tokens - count + sinks, num_tokens))] * num_kv_heads


def _joined(values: list[float], group: str) -> float:
    return sum(values) / len(values) if group == "mean" else max(values)
