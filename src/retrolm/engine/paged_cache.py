"""A cache of fixed shape for methods that choose pages for each generated token, so that a step can be captured.

Token t of a sample stands at place t, after RoPE, and pages lie side by side. Shape letters as in
`ops.paged_attention`; S steps, Q tokens of a step: the newest at the end, those that the method revises before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..methods.token_base import TokenCache
from ..methods.token_pages import PagedTokenMethod, PageState
from ..ops.paged_attention import Tally
from ..ops.rotary import rotate
from .backbone import Backbone
from .rope_table import RopeTable


@dataclass
class PagedLayer:
    """One layer: keys after RoPE and values [B, K, P, W, D], the corners of each page's box, what the method keeps."""

    keys: Tensor
    values: Tensor
    low: Tensor
    high: Tensor
    tally: Tally
    state: PageState = field(default_factory=PageState)


class PagedCache:
    """Keys and values of B samples, their pages' digests, and what the next step feeds.

    The last page is nobody's: rows of a step that stand for no token are written there, behind every position.

    Attributes:
        tokens_B: the newest token, not fed yet. recent_BQ: the tokens of the last step.
        positions_B: position of the newest token; first_B: of the first one fed by a step, int64.
        step: steps done so far, int64 [1].
    """

    def __init__(self, backbone: Backbone, method: PagedTokenMethod, batch: int, places: int) -> None:
        self.method = method
        self._batch = batch
        self._page = method.knobs.page
        num_pages = -(-places // self._page) + 1
        device = backbone.device
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens_B = self.step.new_zeros(batch)
        self.recent_BQ = self.step.new_zeros(batch, method.num_revised + 1)
        self.positions_B, self.first_B = (torch.zeros_like(self.tokens_B) for _ in range(2))
        shape = (batch, backbone.num_kv_heads, num_pages, self._page, backbone.head_dim)
        self.layers = [self._layer(backbone, index, shape, places) for index in range(backbone.num_layers)]

    def _layer(self, backbone: Backbone, index: int, shape: tuple[int, int, int, int, int], places: int) -> PagedLayer:
        """Zeros, not empty: places beyond the text are masked, and a masked NaN would still spread."""
        B, K, P, _, D = shape
        keys = torch.zeros(shape, dtype=backbone.dtype, device=backbone.device)
        sums = self.step.new_zeros(B, backbone.num_heads, self.recent_BQ.shape[1])
        tally = Tally(sums, self.step.new_zeros(places, B, dtype=torch.int32), self.step)
        layer = PagedLayer(keys, torch.zeros_like(keys), keys.new_zeros(B, K, P, D), keys.new_zeros(B, K, P, D), tally)
        if index >= self.method.knobs.num_dense_layers:
            layer.state = self.method.new_state(keys, backbone.num_heads)
        return layer

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def places(self) -> int:
        """Tokens that a sample has room for."""
        return len(self.layers[0].tally.most_SB)

    @property
    def num_pages(self) -> int:
        """Pages of each sample, the one that is nobody's among them."""
        return self.layers[0].keys.shape[2]

    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for layer in self.layers for x in (layer.keys, layer.values))

    def num_kept(self, num_tokens: int) -> int:
        """Tokens kept of so many."""
        return num_tokens

    def advance(self) -> None:
        """The next token stands one place further."""
        self.positions_B.add_(1)
        self.step.add_(1)

    def rewind(self) -> None:
        """Stand at the first place, whatever is in the cache."""
        for x in (self.step, self.positions_B, self.first_B):
            x.zero_()

    def fill(
        self, caches: Sequence[TokenCache | None], ropes: Sequence[RopeTable], lengths: list[int], last: list[int]
    ) -> None:
        """Take over what was read of prompts of `lengths` tokens; their `last` tokens are fed next."""
        self.rewind()
        lengths_B = torch.tensor(lengths)
        self.positions_B.copy_(lengths_B)
        self.first_B.copy_(lengths_B)
        self.tokens_B.copy_(torch.tensor(last))
        self.recent_BQ.zero_()
        for layer, cache, rope in zip(self.layers, caches, ropes, strict=True):
            self._fill(layer, cache, rope, lengths)

    def _fill(self, layer: PagedLayer, cache: TokenCache | None, rope: RopeTable, lengths: list[int]) -> None:
        layer.state.clear()
        layer.tally.sums_BHQ.zero_()
        layer.tally.most_SB.zero_()
        for row, length in enumerate(lengths):
            if cache is None or not length:
                continue
            places = slice(cache.num_places - length, cache.num_places)
            cos, sin = rope.at(torch.arange(length))
            layer.keys[row].flatten(1, 2)[:, :length] = rotate(cache.keys_BKTD[row, :, places], cos, sin)
            layer.values[row].flatten(1, 2)[:, :length] = cache.values_BKTD[row, :, places]
        there = torch.arange(self.num_pages * self._page) < torch.tensor(lengths)[:, None]
        there = there.to(layer.keys.device).unflatten(1, (-1, self._page))[:, None, :, :, None]
        low, high = self.method.corners(layer.keys, there)
        layer.low.copy_(low)
        layer.high.copy_(high)
