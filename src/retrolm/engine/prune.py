"""Answers by methods that prune after a dense prefill, with transformers' `generate` over what stays of each prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..methods.prune_base import PruneMethod
from .decode_round import FirstToken, ended
from .generate_options import GenerateOptions
from .kept_cache import KeptCache
from .prune_pass import PrunePass, PrunePrompt
from .results import Timings
from .stock import left_padded

if TYPE_CHECKING:
    from .model import RetroLM


@dataclass(frozen=True)
class Pruned:
    """What was generated for one prompt, and over how much.

    Attributes:
        token_ids: generated tokens. ended: generation came to an end of its own.
        kept: prompt tokens kept in each layer (per KV head).
        attended: keys that each generated token but the first saw, [step][layer].
        kv_bytes: bytes of the cache when the batch was done, an equal share for each prompt.
    """

    token_ids: list[int]
    ended: bool
    kept: list[int]
    attended: list[list[int]]
    kv_bytes: int
    timings: Timings


@torch.no_grad()
def generate_pruned(
    lm: RetroLM,
    method: PruneMethod,
    prompts: Sequence[PrunePrompt],
    *,
    kv_budget: int,
    max_new_tokens: int,
    **options: Any,
) -> list[Pruned]:
    """Read each prompt with dense attention, prune it, and answer; the same as one prompt at a time.

    The first token comes from the dense prefill, as in the papers; later ones attend what is kept, at true positions,
    and one another.

    Args:
        kv_budget: prompt tokens kept per layer and KV head, mean over layers; generated tokens come on top.
        options: as for transformers' `generate`, one sequence per prompt.

    Raises:
        UserError: a budget the method can't work with, a generation option that can't be honoured, or a prompt whose
            answer would cross the length at which the model's RoPE switches.
    """
    if lm.backbone.has_switching_rope and len(prompts) > 1:
        settings = {"kv_budget": kv_budget, "max_new_tokens": max_new_tokens, **options}
        return [generate_pruned(lm, method, [prompt], **settings)[0] for prompt in prompts]
    checked = GenerateOptions(lm.model, options, lm.eos_ids, lm.pad_id, lm.tokenizer)
    width = _width(lm, method, max(len(prompt.ids) for prompt in prompts), max_new_tokens)
    input_ids, mask = left_padded([prompt.ids for prompt in prompts], lm.pad_id, width)
    cache, first, started = KeptCache(), FirstToken(), time.perf_counter()
    seen = PrunePass(lm.backbone, method, cache, prompts, kv_budget)
    call = checked.call(max_new_tokens, first, checked.streamer)
    with lm.attachment.run(seen):
        out = lm.model.generate(
            input_ids=input_ids.to(lm.device),
            attention_mask=mask.to(lm.device).long(),
            past_key_values=cache,
            **call.arguments,
        )
    finished, new = time.perf_counter(), out[:, width:].tolist()
    timings = Timings(0.0, first.at - started, (finished - first.at) / max(len(new[0]) - 1, 1))
    stops = call.stop.stops(len(prompts), width)
    rows = [ended(row, checked.eos_ids, stop) for row, stop in zip(new, stops, strict=True)]
    share = cache.num_bytes // len(prompts)
    return [_pruned(seen, sample, *row, share, timings) for sample, row in enumerate(rows)]


def _pruned(seen: PrunePass, sample: int, tokens: list[int], over: bool, kv_bytes: int, timings: Timings) -> Pruned:
    steps = seen.attended[: max(len(tokens) - 1, 0)]
    attended = [[layer[sample] for layer in step] for step in steps]
    return Pruned(tokens, over, [layer[sample] for layer in seen.kept], attended, kv_bytes, timings)


def _width(lm: RetroLM, method: PruneMethod, num_tokens: int, num_new: int) -> int:
    """Columns of the padded prompts.

    Raises `UserError` where the model's RoPE would change under keys that are kept: they can't be computed anew.
    """
    if not lm.backbone.has_switching_rope:
        return lm.backbone.cache_room(num_tokens, num_new)
    if method.compact_positions:
        raise UserError(
            f"{method.name} can't move kept keys in a model whose RoPE switches with the length. Use its knob "
            "positions=absolute."
        )
    if lm.backbone.cache_room(num_tokens, num_new) != num_tokens:
        raise UserError(
            f"A prompt of {num_tokens} tokens and {num_new} new ones cross the length at which this model's RoPE "
            f"switches, where {method.name} can't follow. Use fewer new tokens, or a shorter or longer prompt."
        )
    return num_tokens
