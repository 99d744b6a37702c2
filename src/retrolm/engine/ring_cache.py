"""A cache of fixed shape for methods that attend the first and the most recent tokens, so that a step can be captured.

The first `num_first` tokens stand at their own places; any later one takes the place of the token that leaves the
recent ones for it. Shape letters as in `paged_cache`; F first tokens, T places of what was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.first_and_recent import FirstAndRecent
from ..methods.once import Once
from ..methods.token_base import TokenCache
from ..ops.paged_attention import Tally
from ..ops.rotary import rotate
from .backbone import Backbone
from .rope_table import RopeTable

_PAGE = 16  # places that attention takes at a time


@dataclass
class RingLayer:
    """One layer: keys after RoPE and values [B, K, P, W, D]; the first tokens' keys before it, and a row for others."""

    keys: Tensor
    values: Tensor
    first_BKFD: Tensor
    tally: Tally


class RingCache:
    """Keys and values of B samples in `kv_budget` places, and what the next step feeds. The last page is nobody's.

    Attributes:
        tokens_B: the newest token, not fed yet. positions_B: its true position. base_B: what is taken off positions,
            so that they stay small however long the text is. step: steps done so far, int64 [1].
    """

    def __init__(self, backbone: Backbone, method: FirstAndRecent, kv_budget: int, batch: int, places: int) -> None:
        self.method, self.kv_budget = method, kv_budget
        self._places = places
        device, dtype = backbone.device, backbone.dtype
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens_B, self.positions_B, self.base_B = (self.step.new_zeros(batch) for _ in range(3))
        shape = (batch, backbone.num_kv_heads, -(-kv_budget // _PAGE) + 1, _PAGE, backbone.head_dim)
        self.layers = []
        for _ in range(backbone.num_layers):
            # Zeros, not empty: places beyond the text are masked, and a masked NaN would still spread.
            keys = torch.zeros(shape, dtype=dtype, device=device)
            first = keys.new_zeros(*shape[:2], method.num_first + 1, shape[4])
            sums = self.step.new_zeros(batch, backbone.num_heads, 1)
            tally = Tally(sums, self.step.new_zeros(places, batch, dtype=torch.int32), self.step)
            self.layers.append(RingLayer(keys, torch.zeros_like(keys), first, tally))

    @property
    def batch(self) -> int:
        return len(self.tokens_B)

    @property
    def places(self) -> int:
        """Positions that tokens may stand at, and steps."""
        return self._places

    def num_kept(self, num_tokens: int) -> int:
        """Tokens kept of so many."""
        return min(num_tokens, self.kv_budget)

    def rewind(self) -> None:
        """Stand at the first place, whatever is in the cache."""
        for x in (self.step, self.positions_B, self.base_B):
            x.zero_()

    def advance(self) -> None:
        """The next token stands one place further."""
        self.positions_B.add_(1)
        self.step.add_(1)

    def places_of(self, true: Tensor) -> Tensor:
        """Where tokens at these true positions are kept."""
        first = self.method.num_first
        return torch.where(true < first, true, first + (true - first) % (self.kv_budget - first))

    def fill(
        self, caches: Sequence[TokenCache | None], ropes: Sequence[RopeTable], lengths: list[int], last: list[int]
    ) -> None:
        """Take over what was read of prompts of `lengths` tokens; their `last` tokens are fed next."""
        self.rewind()
        self.positions_B.copy_(torch.tensor(lengths))
        self.base_B.copy_(torch.tensor([max(length - self.kv_budget, 0) for length in lengths]))
        self.tokens_B.copy_(torch.tensor(last))
        once = Once()
        for layer, cache, rope in zip(self.layers, caches, ropes, strict=True):
            assert cache is not None
            self._fill(layer, cache, rope, once)

    def _fill(self, layer: RingLayer, cache: TokenCache, rope: RopeTable, once: Once) -> None:
        layer.tally.most_SB.zero_()
        kept, first, positions = once(self._destinations, cache.true_BJT)
        cos, sin = once(rope.at, positions)
        _scatter(layer.keys.flatten(2, 3), kept, rotate(cache.keys_BKTD, cos, sin))
        _scatter(layer.values.flatten(2, 3), kept, cache.values_BKTD)
        _scatter(layer.first_BKFD, first, cache.keys_BKTD)

    def _destinations(self, true_B1T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places of what was read in the cache and among the first tokens, and positions, int64 [B, 1, T] each."""
        num_first = self.method.num_first
        recent = true_B1T > (self.positions_B - (self.kv_budget - num_first))[:, None, None]
        is_first = (true_B1T >= 0) & (true_B1T < num_first)
        nobodys = self.layers[0].keys.shape[2] * _PAGE - 1
        kept = self.places_of(true_B1T).masked_fill((true_B1T < 0) | ~(is_first | recent), nobodys)
        positions = (true_B1T - self.base_B[:, None, None]).clamp(min=0)
        return kept, true_B1T.masked_fill(~is_first, num_first), positions


def _scatter(rows_BKCD: Tensor, places_B1T: Tensor, new_BKTD: Tensor) -> None:
    rows_BKCD.scatter_(2, places_B1T[..., None].expand_as(new_BKTD), new_BKTD)
