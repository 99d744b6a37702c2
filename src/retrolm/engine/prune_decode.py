"""Pruned answers by the engine's own loop: prompts are read one by one, and what stays of each fills its cache.

Kept tokens stand at their true positions, which are not their places: the loop goes on where each prompt ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..methods.prune_base import PruneMethod
from .cache_argument import cache_argument
from .compact_cache import CompactCache
from .decode_reading import DecodeRequest
from .dense_decode import places_for_prompt
from .generate_options import GenerateOptions
from .kept_cache import KeptCache
from .prune_pass import PrunePass, PrunePrompt

if TYPE_CHECKING:
    from .model import RetroLM


@dataclass(frozen=True)
class PrunedPrompt:
    """One prompt that was read: what each layer kept of it, and the logits [V] of the first token behind it."""

    num_tokens: int
    seen: PrunePass
    cache: KeptCache
    logits_V: Tensor

    @property
    def kept(self) -> list[int]:
        """Tokens kept in each layer (per KV head)."""
        return [layer[0] for layer in self.seen.kept]


def read_pruned(lm: RetroLM, method: PruneMethod, prompt: PrunePrompt, kv_budget: int) -> PrunedPrompt:
    """Read a prompt with dense attention and prune it, layer by layer."""
    cache = KeptCache()
    seen = PrunePass(lm.backbone, method, cache, [prompt], kv_budget)
    inputs = torch.tensor([prompt.ids], device=lm.device)
    with lm.attachment.run(seen):
        out = lm.model(input_ids=inputs, **cache_argument(lm.model, cache), use_cache=True, logits_to_keep=1)
    return PrunedPrompt(len(prompt.ids), seen, cache, out.logits[0, -1])


def pruned_request(
    read: Sequence[PrunedPrompt], input_ids: Tensor, max_new_tokens: int, options: GenerateOptions
) -> DecodeRequest:
    """What the loop is to generate behind prompts that were read; `input_ids` [B, T] as `generate` would get them."""
    wants_ids = options.streamer is not None or options.criteria
    room = max(max(prompt.kept) for prompt in read)
    return DecodeRequest(
        rows=len(read),
        places=places_for_prompt(room + max_new_tokens),
        positions=places_for_prompt(max(prompt.num_tokens for prompt in read) + max_new_tokens),
        fill=lambda cache: fill_kept(cache, read, room),
        num_tokens=max_new_tokens,
        prompts=input_ids if wants_ids else None,
        streamer=options.streamer,
        **options.loop_settings(),
    )


def fill_kept(cache: CompactCache, read: Sequence[PrunedPrompt], room: int) -> Tensor:
    """Write what is kept of each prompt in front of place `room`; returns the first tokens' logits [B, V]."""
    starts_LB = room - torch.tensor([prompt.kept for prompt in read]).T
    for row, prompt in enumerate(read):
        for layer, (k_1KTD, v_1KTD) in enumerate(prompt.cache.kept):
            places = slice(int(starts_LB[layer, row]), room)
            cache.keys[layer][row, :, places] = k_1KTD[0]
            cache.values[layer][row, :, places] = v_1KTD[0]
    ends_B = torch.tensor([prompt.num_tokens + 1 for prompt in read])
    cache.begin(ends_B, starts_LB, torch.zeros(len(read), dtype=torch.int64), index=room)
    return torch.stack([prompt.logits_V for prompt in read])
