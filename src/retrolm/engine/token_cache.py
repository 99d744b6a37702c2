"""What a token method's layer keeps between chunks, and a stand-in for transformers' cache that only counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..methods.token_base import TokenCache, places_of


def empty_cache(k_BKQD: Tensor, v_BKQD: Tensor) -> TokenCache:
    """A cache of no tokens, like these."""
    places = torch.empty(len(k_BKQD), 1, 0, dtype=torch.int64, device=k_BKQD.device)
    return TokenCache(k_BKQD[:, :, :0], v_BKQD[:, :, :0], places)


def append(cache: TokenCache, k_BKQD: Tensor, v_BKQD: Tensor, true_BQ: Tensor) -> None:
    """Put new tokens behind those of a cache."""
    cache.keys_BKTD = torch.cat([cache.keys_BKTD, k_BKQD], 2)
    cache.values_BKTD = torch.cat([cache.values_BKTD, v_BKQD], 2)
    new = true_BQ[:, None].expand(-1, cache.true_BJT.shape[1], -1)
    cache.true_BJT = torch.cat([cache.true_BJT, new], 2)


def drop_last(cache: TokenCache, num_places: int) -> None:
    """Take the last places out of a cache."""
    left = cache.num_places - num_places
    cache.keys_BKTD, cache.values_BKTD = cache.keys_BKTD[:, :, :left], cache.values_BKTD[:, :, :left]
    cache.true_BJT = cache.true_BJT[:, :, :left]
    cache.marks_BMT = None if cache.marks_BMT is None else cache.marks_BMT[:, :, :left]


def take(cache: TokenCache, places_BJS: Tensor) -> None:
    """Keep these places of a cache, in this order; -1 leaves a place empty."""
    index, empty = places_BJS.clamp(min=0), places_BJS < 0
    if cache.marks_BMT is not None:
        rows = cache.marks_BMT.shape[1]
        marks = torch.nn.functional.pad(cache.marks_BMT, (0, cache.num_places - cache.marks_BMT.shape[2]))
        cache.marks_BMT = marks.gather(2, index.expand(-1, rows, -1)).masked_fill(empty, 0.0)
    J = max(places_BJS.shape[1], cache.true_BJT.shape[1])
    true = cache.true_BJT.expand(-1, J, -1).gather(2, index.expand(-1, J, -1))
    cache.true_BJT = true.masked_fill(empty, -1)
    cache.keys_BKTD = gather_rows(cache.keys_BKTD, index)
    cache.values_BKTD = gather_rows(cache.values_BKTD, index)


def gather_rows(x_BKTD: Tensor, places_BJS: Tensor) -> Tensor:
    """Rows of keys or values at these places, [B, K, S, D]."""
    index = places_BJS.clamp(min=0).expand(-1, x_BKTD.shape[1], -1)[..., None]
    return x_BKTD.gather(2, index.expand(-1, -1, -1, x_BKTD.shape[3]))


def align_right(cache: TokenCache) -> None:
    """Move the tokens of each sample to the end, so that new ones follow them without a gap."""
    there = cache.true_BJT >= 0
    take(cache, places_of(there, int(there.sum(-1).max())))


def num_kept(cache: TokenCache) -> list[int]:
    """Tokens kept for each sample (by the head that keeps most)."""
    found: list[int] = (cache.true_BJT >= 0).sum(-1).amax(1).tolist()
    return found


class CountingLayer(DynamicLayer):
    """Holds nothing: hands back what it is given, and knows how many tokens there were."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self._num_tokens = num_tokens

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone."""
        self._num_tokens += key_states.shape[2]
        return key_states, value_states

    def crop(self, max_length: int) -> None:
        """Count no more than so many tokens: the others come again."""
        self._num_tokens = min(self._num_tokens, max_length)

    def get_seq_length(self, *_: Any) -> int:
        """Tokens so far."""
        return self._num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask would cover, and the first of them."""
        return self._num_tokens + query_length, 0


def counting_cache(num_layers: int, num_tokens: int) -> DynamicCache:
    """A cache for `generate` that counts from `num_tokens` on."""
    cache = DynamicCache()
    cache.layers = [CountingLayer(num_tokens) for _ in range(num_layers)]
    return cache
