"""Dense answers by the engine's own loop: the stock model reads whole prompts into a cache of fixed shape.

Each layer's keys and values are written where the loop reads them; there is no other copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .cache_argument import cache_argument
from .compact_cache import ROUND, CompactCache
from .decode_reading import DecodeRequest
from .generate_options import GenerateOptions
from .token_cache import CountingLayer

if TYPE_CHECKING:
    from .model import RetroLM


class _WrittenLayer(CountingLayer):
    """Writes one prompt's keys and values of a layer into [K, T, D] tensors; hands back what it is given."""

    def __init__(self, keys_KTD: Tensor, values_KTD: Tensor) -> None:
        super().__init__(0)
        self._keys_KTD, self._values_KTD = keys_KTD, values_KTD

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of the prompt, which is read in one pass."""
        self._keys_KTD.copy_(key_states[0])
        self._values_KTD.copy_(value_states[0])
        return super().update(key_states, value_states)


def dense_request(
    lm: RetroLM, prompts: Sequence[Sequence[int]], input_ids: Tensor, max_new_tokens: int, options: GenerateOptions
) -> DecodeRequest:
    """What the loop is to generate behind prompts; `input_ids` [B, T] as `generate` would be given them."""
    wants_ids = options.streamer is not None or options.criteria
    return DecodeRequest(
        rows=len(prompts),
        places=places_for_prompt(max(map(len, prompts)) + max_new_tokens),
        fill=lambda cache: read_into(lm, cache, prompts),
        num_tokens=max_new_tokens,
        prompts=input_ids if wants_ids else None,
        streamer=options.streamer,
        **options.loop_settings(),
    )


def places_for_prompt(num_tokens: int) -> int:
    """Places for so many tokens, up to a sixteenth more, so that prompts of like lengths share a captured step."""
    step = max(ROUND, 1 << max(num_tokens.bit_length() - 5, 0))
    return -(-num_tokens // step) * step


def read_into(lm: RetroLM, cache: CompactCache, prompts: Sequence[Sequence[int]]) -> None:
    """Read each prompt but its last token with dense attention, one by one, and feed the last tokens next."""
    ends = torch.tensor([len(ids) for ids in prompts])
    room = int(ends.max()) - 1
    starts_B = room + 1 - ends
    cache.begin(ends, starts_B.expand(len(cache.keys), -1), torch.tensor([ids[-1] for ids in prompts]))
    for row, ids in enumerate(prompts):
        if len(ids) > 1:
            places = slice(room + 1 - len(ids), room)
            layers = [
                _WrittenLayer(keys[row, :, places], values[row, :, places])
                for keys, values in zip(cache.keys, cache.values, strict=True)
            ]
            _read(lm, ids[:-1], layers)


def _read(lm: RetroLM, ids: Sequence[int], layers: list[_WrittenLayer]) -> None:
    cache = DynamicCache()
    cache.layers = list(layers)
    inputs = torch.tensor([list(ids)], device=lm.device)
    lm.backbone.decoder(input_ids=inputs, **cache_argument(lm.backbone.decoder, cache), use_cache=True)
