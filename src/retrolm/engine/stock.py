"""Dense attention by the stock model inside a `RetroLM`: the same token ids, nothing left out, nothing replaced.

Several prompts are prefilled one by one (no padding, no mask, so the stock kernels run as they would alone) and then
decoded together: by the engine's own loop over one cache of fixed shape, or by `generate` over their joined caches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import UserError
from .cache_argument import cache_argument
from .decode_round import Continuation, FirstToken, continuation, from_loop
from .dense_decode import dense_request
from .fast_decode import fast_decode_of
from .generate_options import GenerateOptions

if TYPE_CHECKING:
    from .model import RetroLM


@dataclass(frozen=True)
class StockAnswer:
    """What the stock model generated.

    Attributes:
        text: the answer without special tokens. token_ids: its tokens.
        num_attended: most keys that any token attended to.
        ttft_s: from the start of the batch to its first token. tpot_s: each further token.
        truncated: generation stopped at `max_new_tokens`. decode_path: what generated, as in `Answer`.
    """

    text: str
    token_ids: tuple[int, ...]
    num_attended: int
    ttft_s: float
    tpot_s: float
    truncated: bool
    decode_path: str


@torch.no_grad()
def stock_answers(
    lm: RetroLM, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **options: Any
) -> list[StockAnswer]:
    """Continue each prompt (token ids) with dense attention; the same as one at a time.

    Args:
        options: as for transformers' `generate`, one sequence per prompt.

    Raises:
        UserError: an unknown option, one that can't be honoured, or nothing to answer.
    """
    if not can_join(lm) and len(prompts) > 1:
        return [stock_answers(lm, [ids], max_new_tokens=max_new_tokens, **options)[0] for ids in prompts]
    checked = GenerateOptions(lm.model, options, lm.eos_ids, lm.pad_id, lm.tokenizer)
    require_one_sequence("Dense attention", prompts, max_new_tokens, checked)
    started = time.perf_counter()
    found = _continued(lm, prompts, max_new_tokens, checked)
    return [
        StockAnswer(
            text=lm.tokenizer.decode(tokens, skip_special_tokens=True).strip() if lm.tokenizer is not None else "",
            token_ids=tuple(tokens),
            num_attended=len(ids) + max(len(tokens) - 1, 0),
            ttft_s=found.first_at - started,
            tpot_s=found.tpot_s,
            truncated=not over,
            decode_path=found.path,
        )
        for ids, (tokens, over) in zip(prompts, found.rows, strict=True)
    ]


def require_one_sequence(
    what: str, prompts: Sequence[Sequence[int]], max_new_tokens: int, checked: GenerateOptions
) -> None:
    """Raise `UserError` where there is nothing to answer, or more than one answer is asked for."""
    if checked.num_return_sequences > 1:
        raise UserError(f"{what} generates one sequence per prompt. Leave out num_return_sequences.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not all(prompts):
        raise UserError("Nothing to answer: a prompt has no tokens.")


def _continued(
    lm: RetroLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, checked: GenerateOptions
) -> Continuation:
    """By the engine's own loop over a cache of the whole prompts where it applies and is wanted, else by `generate`."""
    input_ids, _ = left_padded(prompts, lm.pad_id, max(map(len, prompts)))
    request = dense_request(lm, prompts, input_ids, max_new_tokens, checked)
    slides = any(info.window is not None for info in lm.backbone.layers)
    fast, obstacle = fast_decode_of(lm.attachment, lm.backbone), "a dense prompt in sliding layers" if slides else None
    fast.release_but(request.rows, request.places)
    decoded, path = fast.attempt(lm.attachment, checked, lambda: request, obstacle)
    return _by_generate(lm, prompts, max_new_tokens, checked, path) if decoded is None else from_loop(decoded, checked)


def _by_generate(
    lm: RetroLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, checked: GenerateOptions, path: str
) -> Continuation:
    width, first = max(map(len, prompts)), FirstToken()
    input_ids, mask = left_padded(prompts, lm.pad_id, width)
    call, cache = checked.call(max_new_tokens, first, checked.streamer), _prefilled(lm, prompts)
    if cache is not None and checked.num_sequences > 1:
        cache.batch_repeat_interleave(checked.num_sequences)
    out = lm.model.generate(
        input_ids=input_ids.to(lm.device),
        attention_mask=mask.to(lm.device).long(),
        **cache_argument(lm.model, cache),
        **call.arguments,
    )
    return continuation(out, width, call, checked, first, path)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, width: int) -> tuple[Tensor, Tensor]:
    """Token ids int64 [B, width] of prompts that end together, and where they stand, bool [B, width]."""
    input_ids = torch.full((len(prompts), width), pad_id)
    for row, ids in zip(input_ids, prompts, strict=True):
        row[width - len(ids) :] = torch.tensor(ids)
    return input_ids, torch.arange(width) >= torch.tensor([width - len(ids) for ids in prompts])[:, None]


def can_join(lm: RetroLM) -> bool:
    """Whether caches of several prompts can be decoded together with the same result as apart.

    Not so with sliding layers, which keep a window of each prompt, and with RoPE that depends on the longest one.
    """
    return not lm.backbone.has_switching_rope and all(info.window is None for info in lm.backbone.layers)


def _prefilled(lm: RetroLM, prompts: Sequence[Sequence[int]]) -> DynamicCache | None:
    """The joined cache of all tokens but each prompt's last one; None where there is nothing but the last one."""
    width = max(map(len, prompts)) - 1
    if len(prompts) == 1 or not width:
        return None
    caches = [_cache(lm, ids[:-1]) for ids in prompts]
    joined = DynamicCache()
    for layer in range(lm.backbone.num_layers):
        keys = torch.cat([_padded(cache, layer, width, True) for cache in caches])
        values = torch.cat([_padded(cache, layer, width, False) for cache in caches])
        joined.update(keys, values, layer)
        for cache in caches:
            cache.layers[layer] = None  # frees the layer before the next one is joined
    return joined


def _cache(lm: RetroLM, ids: Sequence[int]) -> Any:
    inputs = torch.tensor([list(ids)], device=lm.device)
    return lm.model(inputs, use_cache=True, logits_to_keep=1).past_key_values


def _padded(cache: Any, layer: int, width: int, keys: bool) -> Tensor:
    """Keys or values [1, K, width, D] of a layer, zeros at the left."""
    found: Tensor = cache.layers[layer].keys if keys else cache.layers[layer].values
    return torch.nn.functional.pad(found, (0, 0, width - found.shape[2], 0))
