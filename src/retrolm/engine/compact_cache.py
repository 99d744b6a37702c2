"""A compact cache of fixed shape, so that decoding can run as one captured CUDA graph.

Shape letters: B samples, K KV heads, C places, D head dim, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backbone import Backbone
from .prefill import QueryCapture

ROUND = 256  # places are rounded up to this, so that answers of like lengths share a cache


class CompactCache:
    """Keys and values of B samples in C places per layer, and what the next step feeds.

    All samples write at the same place; each layer's set ends there and begins at a place of its own.

    Attributes:
        keys, values: [B, K, C, D] per layer; rotated keys. starts_LB: first place that holds a token, int64.
        index: place of the token to feed, int64 [1]. tokens_B, positions_B: that token and its position, int64.
    """

    def __init__(self, backbone: Backbone, batch: int, places: int) -> None:
        shape = (batch, backbone.num_kv_heads, places, backbone.head_dim)
        device = backbone.device
        # Zeros, not empty: places beyond the set are masked, and a masked NaN would still spread.
        self.keys = [torch.zeros(shape, dtype=backbone.dtype, device=device) for _ in backbone.layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.starts_LB = torch.zeros(backbone.num_layers, batch, dtype=torch.int64, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions_B = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def batch(self) -> int:
        return len(self.tokens_B)

    @property
    def places(self) -> int:
        return self.keys[0].shape[2]

    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def fill(self, captures: list[QueryCapture], last_tokens: list[int], repeats: int = 1) -> None:
        """Take over the gathered sets of query pages, each `repeats` times; each query's last token is fed first."""
        ends = torch.tensor([capture.end for capture in captures])
        room = int(ends.max()) - 1
        starts = torch.zeros(len(self.keys), len(captures), dtype=torch.int64)
        for sample, capture in enumerate(captures):
            rows = slice(sample * repeats, (sample + 1) * repeats)
            for layer, (keys, values) in enumerate(zip(capture.keys, capture.values, strict=True)):
                start = room + 1 - len(keys)
                self.keys[layer][rows, :, start:room] = keys[:-1].transpose(0, 1)
                self.values[layer][rows, :, start:room] = values[:-1].transpose(0, 1)
                starts[layer, sample] = start
        rest = (ends, torch.tensor(last_tokens))
        ends, tokens = (x.repeat_interleave(repeats) for x in rest)
        self.begin(ends, starts.repeat_interleave(repeats, 1), tokens)

    def begin(self, ends_B: Tensor, starts_LB: Tensor, last_tokens_B: Tensor, index: int | None = None) -> None:
        """Feed samples' last tokens next; `ends_B`: tokens of each, the last one included (int64 on the host).

        Args:
            index: the place of these tokens, where samples don't hold all tokens before them; None = their ends.
        """
        self.starts_LB.copy_(starts_LB)
        self.index.fill_(int(ends_B.max()) - 1 if index is None else index)
        self.positions_B.copy_(ends_B - 1)
        self.tokens_B.copy_(last_tokens_B)

    def rewind(self) -> None:
        """Stand at the first place, whatever is in the cache."""
        self.index.zero_()
        self.positions_B.zero_()

    def advance(self) -> None:
        """The next token stands one place further."""
        self.index.add_(1)
        self.positions_B.add_(1)


def places_for(captures: list[QueryCapture], num_new: int) -> int:
    """Places that `num_new` generated tokens behind the queries need, rounded up."""
    needed = max(capture.end for capture in captures) + num_new
    return -(-needed // ROUND) * ROUND
