"""What a token method's layer keeps between chunks, and a stand-in for transformers' cache that only counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..methods.once import Once
from ..methods.token_base import NewTokens, TokenCache, places_of


def empty_cache(k_BKQD: Tensor, v_BKQD: Tensor, once: Once) -> TokenCache:
    """A cache of no tokens, like these."""
    places = once(_no_places, len(k_BKQD), k_BKQD.device)
    return TokenCache(k_BKQD[:, :, :0], v_BKQD[:, :, :0], places)


def _no_places(num_samples: int, device: torch.device) -> Tensor:
    return torch.empty(num_samples, 1, 0, dtype=torch.int64, device=device)


def append(cache: TokenCache, k_BKQD: Tensor, v_BKQD: Tensor, new: NewTokens) -> None:
    """Put new tokens behind those of a cache."""
    cache.keys_BKTD = torch.cat([cache.keys_BKTD, k_BKQD], 2)
    cache.values_BKTD = torch.cat([cache.values_BKTD, v_BKQD], 2)
    cache.true_BJT = new.once(_with_new, cache.true_BJT, new.true_BQ)


def _with_new(true_BJT: Tensor, true_BQ: Tensor) -> Tensor:
    return torch.cat([true_BJT, true_BQ[:, None].expand(-1, true_BJT.shape[1], -1)], 2)


def drop_last(cache: TokenCache, num_places: int) -> None:
    """Take the last places out of a cache."""
    left = cache.num_places - num_places
    cache.keys_BKTD, cache.values_BKTD = cache.keys_BKTD[:, :, :left], cache.values_BKTD[:, :, :left]
    cache.true_BJT = cache.true_BJT[:, :, :left]
    cache.marks_BMT = None if cache.marks_BMT is None else cache.marks_BMT[:, :, :left]


def take(cache: TokenCache, places_BJS: Tensor, once: Once) -> None:
    """Keep these places of a cache, in this order; -1 leaves a place empty."""
    index, empty = once(at_least_0, places_BJS), once(_is_empty, places_BJS)
    if cache.marks_BMT is not None:
        marks, missing = cache.marks_BMT, cache.num_places - cache.marks_BMT.shape[2]
        marks = torch.nn.functional.pad(marks, (0, missing)) if missing else marks
        cache.marks_BMT = marks.gather(2, index.expand(-1, marks.shape[1], -1)).masked_fill(empty, 0.0)
    cache.true_BJT = once(_positions_left, cache.true_BJT, index, empty)
    cache.keys_BKTD, cache.values_BKTD = gather_rows((cache.keys_BKTD, cache.values_BKTD), places_BJS, once)


def gather_rows(rows: tuple[Tensor, ...], places_BJS: Tensor, once: Once) -> tuple[Tensor, ...]:
    """Rows of keys and values at these places, [B, K, S, D] each."""
    index = once(_row_index, once(at_least_0, places_BJS), rows[0].shape[1], rows[0].shape[3])
    return tuple(x.gather(2, index) for x in rows)


def at_least_0(places: Tensor) -> Tensor:
    """Places or positions, 0 where there is none."""
    return places.clamp(min=0)


def _is_empty(places_BJS: Tensor) -> Tensor:
    return places_BJS < 0


def _positions_left(true_BJT: Tensor, index_BJS: Tensor, empty_BJS: Tensor) -> Tensor:
    J = max(index_BJS.shape[1], true_BJT.shape[1])
    return true_BJT.expand(-1, J, -1).gather(2, index_BJS.expand(-1, J, -1)).masked_fill(empty_BJS, -1)


def _row_index(index_BJS: Tensor, num_heads: int, width: int) -> Tensor:
    return index_BJS.expand(-1, num_heads, -1)[..., None].expand(-1, -1, -1, width)


def align_right(cache: TokenCache, once: Once) -> None:
    """Move the tokens of each sample to the end, so that new ones follow them without a gap."""
    take(cache, once(_side_by_side, cache.true_BJT), once)


def _side_by_side(true_BJT: Tensor) -> Tensor:
    there = true_BJT >= 0
    return places_of(there, int(there.sum(-1).max()))


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
