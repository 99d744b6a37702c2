"""Decoding over a compact cache: the query page's gathered keys and values, then the generated tokens.

The cache is an ordinary transformers cache, so `generate` works with all its features. Its rows are right-aligned; a
layer whose set is shorter than the room masks the left part by one number per layer and sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from ..ops.attention import attend, bias_from
from .backbone import Backbone
from .growing_cache import growing_cache
from .prefill import QueryCapture


class DecodeProgram:
    """Attention of generated tokens over the compact cache (a `Program`).

    Attributes:
        starts_LB: first cache place that holds a token, int64 [layers, B].
    """

    def __init__(self, backbone: Backbone, starts_LB: Tensor) -> None:
        self._backbone = backbone
        self.starts_LB = starts_LB
        self._masked = (starts_LB > 0).any(1).tolist()
        self.max_keys = 0

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """Generated tokens are normal tokens; nothing to replace."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        self.max_keys = max(self.max_keys, k.shape[2])
        bias = self._bias(layer, q, k)
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        return attend(rows[0], rows[1], rows[2], bias, scale, softcap)

    def _bias(self, layer: int, q: Tensor, k: Tensor) -> Tensor | None:
        num_queries, num_keys = q.shape[2], k.shape[2]
        window = self._backbone.layers[layer].window
        slides = window is not None and num_keys > window
        if not self._masked[layer] and not slides and num_queries == 1:
            return None
        key = torch.arange(num_keys, device=q.device)
        query = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
        starts = self.starts_LB[layer].to(q.device)
        repeats = q.shape[0] // len(starts)
        allowed = (key >= starts.repeat_interleave(repeats)[:, None, None]) & (key <= query)
        if window is not None:
            allowed &= query - key < window
        return bias_from(allowed, q.dtype)


def build_cache(captures: list[QueryCapture], room: int) -> tuple[Cache, Tensor, Tensor]:
    """Build the cache for B query pages, without each page's last token (generation feeds that one first).

    Args:
        room: cache places, at least the most tokens that stand before any query's last one.

    Returns:
        The cache; starts int64 [layers, B]; the 2D attention mask bool [B, room + 1]
        that counts positions right (the last column is the token to feed).
    """
    num_layers = len(captures[0].keys)
    ends = [capture.end for capture in captures]
    starts = torch.zeros(num_layers, len(captures), dtype=torch.int64)
    cache = growing_cache()
    for layer in range(num_layers):
        like = captures[0].keys[layer]
        keys = like.new_zeros(len(captures), room, *like.shape[1:])
        values = torch.zeros_like(keys)
        for sample, capture in enumerate(captures):
            start = room + 1 - len(capture.keys[layer])
            keys[sample, start:] = capture.keys[layer][:-1]
            values[sample, start:] = capture.values[layer][:-1]
            starts[layer, sample] = start
        cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
    mask = torch.arange(room + 1) >= torch.tensor([room + 1 - end for end in ends])[:, None]
    return cache, starts, mask
