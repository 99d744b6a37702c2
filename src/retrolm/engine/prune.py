"""Answers by methods that prune after a dense prefill, over what stays of each prompt.

Where the engine's own decoding loop applies it generates, else transformers' `generate` does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..methods.prune_base import PruneMethod
from .cache_argument import cache_argument
from .decode_reading import DecodeRequest
from .decode_round import Continuation, FirstToken, continuation, from_loop
from .fast_decode import fast_decode_of
from .generate_options import GenerateOptions
from .kept_cache import KeptCache
from .prune_decode import PrunedPrompt, pruned_request, read_pruned
from .prune_pass import PrunePass, PrunePrompt
from .results import Timings
from .stock import left_padded, require_one_sequence

if TYPE_CHECKING:
    from .model import RetroLM


@dataclass(frozen=True)
class Pruned:
    """What was generated for one prompt, and over how much.

    Attributes:
        token_ids: generated tokens. ended: generation came to an end of its own.
        kept: prompt tokens kept in each layer (per KV head).
        attended: keys that each generated token but the first saw, [step][layer].
        kv_bytes: bytes of keys and values held when the batch was done; of `generate`'s cache an equal share each.
        decode_path: what generated, as in `Answer`.
    """

    token_ids: list[int]
    ended: bool
    kept: list[int]
    attended: list[list[int]]
    kv_bytes: int
    timings: Timings
    decode_path: str


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
    require_one_sequence(f"Method {method.name!r}", [prompt.ids for prompt in prompts], max_new_tokens, checked)
    width = _width(lm, method, max(len(prompt.ids) for prompt in prompts), max_new_tokens)
    return _Batch(lm, method, prompts, kv_budget, max_new_tokens, checked, width).answers()


class _Batch:
    """Prompts to answer side by side; `width` is that of the padded ids."""

    def __init__(
        self,
        lm: RetroLM,
        method: PruneMethod,
        prompts: Sequence[PrunePrompt],
        kv_budget: int,
        num_tokens: int,
        options: GenerateOptions,
        width: int,
    ) -> None:
        self._lm, self._method, self._prompts, self._kv_budget = lm, method, prompts, kv_budget
        self._num_tokens, self._options, self._width = num_tokens, options, width
        self._input_ids, self._mask = left_padded([prompt.ids for prompt in prompts], lm.pad_id, width)
        self._read: list[PrunedPrompt] = []
        self._started = time.perf_counter()

    def answers(self) -> list[Pruned]:
        """By the engine's own loop where it applies and is wanted, else by `generate`."""
        lm = self._lm
        slides = any(info.window is not None for info in lm.backbone.layers)
        obstacle = "a pruned prompt in sliding layers" if slides else None
        fast = fast_decode_of(lm.attachment, lm.backbone)
        decoded, path = fast.attempt(lm.attachment, self._options, self._request, obstacle)
        return self._by_generate(path) if decoded is None else self._by_loop(from_loop(decoded, self._options))

    def _request(self) -> DecodeRequest:
        self._read = [read_pruned(self._lm, self._method, prompt, self._kv_budget) for prompt in self._prompts]
        return pruned_request(self._read, self._input_ids, self._num_tokens, self._options)

    def _by_loop(self, found: Continuation) -> list[Pruned]:
        """A step attends what is kept and all tokens generated before it."""
        backbone, answers = self._lm.backbone, []
        row_bytes = 2 * backbone.num_kv_heads * backbone.head_dim * backbone.dtype.itemsize
        for prompt, (tokens, over) in zip(self._read, found.rows, strict=True):
            kept = prompt.kept
            attended = [[layer + step for layer in kept] for step in range(1, max(len(tokens), 1))]
            num_bytes = sum(attended[-1] if attended else kept) * row_bytes
            answers.append(Pruned(tokens, over, kept, attended, num_bytes, self._timings(found), found.path))
        return answers

    def _by_generate(self, path: str) -> list[Pruned]:
        lm, cache, first = self._lm, KeptCache(), FirstToken()
        seen = PrunePass(lm.backbone, self._method, cache, self._prompts, self._kv_budget)
        call = self._options.call(self._num_tokens, first, self._options.streamer)
        with lm.attachment.run(seen):
            out = lm.model.generate(
                input_ids=self._input_ids.to(lm.device),
                attention_mask=self._mask.to(lm.device).long(),
                **cache_argument(lm.model, cache),
                **call.arguments,
            )
        found = continuation(out, self._width, call, self._options, first, path)
        timings, share = self._timings(found), cache.num_bytes // len(self._prompts)
        return [_pruned(seen, sample, *row, share, timings, path) for sample, row in enumerate(found.rows)]

    def _timings(self, found: Continuation) -> Timings:
        return Timings(0.0, found.first_at - self._started, found.tpot_s)


def _pruned(
    seen: PrunePass, sample: int, tokens: list[int], over: bool, kv_bytes: int, timings: Timings, path: str
) -> Pruned:
    steps = seen.attended[: max(len(tokens) - 1, 0)]
    attended = [[layer[sample] for layer in step] for step in steps]
    return Pruned(tokens, over, [layer[sample] for layer in seen.kept], attended, kv_bytes, timings, path)


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
