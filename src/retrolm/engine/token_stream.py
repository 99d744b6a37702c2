"""Reading and generating with a token method: in each layer, what the method selects of a cache that the engine keeps.

Prompts are read side by side, a chunk at a time, each from its own start, so that a batch gives what its prompts give
alone. Keys are kept before RoPE; the stock model sees position 0 everywhere. Shape letters as in `methods.token_base`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.sliding_window import SlidingWindow
from ..methods.token_base import ChunkView, NewTokens, Part, QuestionQueries, TokenCache, TokenMethod
from ..ops.attention import attend, bias_from
from ..ops.joint_attention import KeySet, attend_sets, attend_sets_lse, attend_sets_reference
from ..ops.rotary import rotate, unscaled
from .backbone import Backbone
from .token_cache import align_right, append, drop_last, empty_cache, gather_rows, num_kept, take


class TokenStream:
    """The forward passes of one batch (a `Program` for `Attachment.run`).

    Attributes:
        prefill_LB: most keys that any prompt token attended in each layer, int64.
        decode: for each generated step, keys attended in each layer, [L, B] on the CPU (call `decode_counts`).
        dense_heads_LK: KV heads that the method leaves dense, bool; None = none.
        questions: what layers computed for the questions alone, where the method asks for it.
        max_position: highest RoPE position that can have been used.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: TokenMethod,
        kv_budget: int,
        num_samples: int,
        dense_heads_LK: Tensor | None = None,
    ) -> None:
        self._backbone = backbone
        self._dense_heads = _by_layer(backbone, dense_heads_LK)
        self._method = method
        self._kv_budget = kv_budget
        self._own = {i: _own_window(backbone, i) for i in range(backbone.num_layers) if not backbone.retrieves(i)}
        self._caches: list[TokenCache | None] = [None] * backbone.num_layers
        self._lengths = [0] * num_samples
        self._new: dict[torch.device, NewTokens] = {}
        self._num_again = 0
        self._prefill: list[Tensor | None] = [None] * backbone.num_layers
        self._decode: list[list[Tensor]] = [[] for _ in range(backbone.num_layers)]
        self._decode_dense: list[list[Tensor]] = [[] for _ in range(backbone.num_layers)]
        self._shared: dict[str, Any] = {}
        self.questions: dict[int, QuestionQueries] = {}

    # --- steps ----------------------------------------------------------------------------------------------

    def chunk_tokens(self) -> int:
        """Prompt tokens read at a time."""
        return self._method.chunk_tokens(self._kv_budget)

    @property
    def num_revised(self) -> int:
        """Generated tokens before the newest that each step brings again."""
        return self._method.num_revised

    @property
    def needs_question(self) -> bool:
        """Whether `questions` are to be read first."""
        return self._method.needs_question

    def begin(self, num_new: Sequence[int], is_prefill: bool, num_again: int = 0) -> None:
        """Say what the next forward pass brings: new tokens of each sample, at the left of their rows.

        With `num_again`, so many tokens at the front of each row are the last ones so far, to be replaced.
        """
        self._num_again = num_again
        before, new = [length - num_again for length in self._lengths], list(num_new)
        ends = torch.tensor(before)[:, None] + torch.arange(max(new))
        true = ends.masked_fill(torch.arange(max(new)) >= torch.tensor(new)[:, None], -1)
        devices = {info.device for info in self._backbone.layers}
        tensors = (true, torch.tensor(before), torch.tensor(new))
        self._new = {
            device: NewTokens(placed[0], before, new, placed[1], placed[2], is_prefill)
            for device in devices
            for placed in [[x.to(device) for x in tensors]]
        }
        self._lengths = [b + n for b, n in zip(before, new, strict=True)]

    def end_prefill(self) -> None:
        """Line up the samples' caches at their ends, where generated tokens follow."""
        for cache in self._caches:
            if cache is not None and len(set(self._lengths)) > 1:
                align_right(cache)

    def require_positions(self, num_tokens: int) -> None:
        """Make room in the RoPE tables for a text of so many tokens; raises `UserError` past the model's limit."""
        reach = self._kv_budget + self.chunk_tokens()
        needed = num_tokens if self._method.true_positions else max(self._kv_budget, min(num_tokens, reach))
        windows = [min(method.knobs.window + self.chunk_tokens(), num_tokens) for method in self._own.values()]
        self.max_position = max(needed, min(max(windows, default=0), num_tokens)) - 1
        self._backbone.require_positions(max(needed, *windows, self._kv_budget) + 1 if windows else needed + 1)

    def read_so_far(self) -> tuple[list[TokenCache | None], list[int]]:
        """Each layer's cache, and tokens of each sample."""
        return self._caches, self._lengths

    # --- what it took ---------------------------------------------------------------------------------------

    def prefill_counts(self) -> list[list[int]]:
        """Most keys attended while reading, [layer][sample]."""
        nothing = [0] * len(self._lengths)
        return [nothing if found is None else found.tolist() for found in self._prefill]

    def decode_counts(self) -> list[list[list[int]]]:
        """Keys attended by each generated token, heads that are left dense aside, [layer][step][sample]."""
        return [torch.stack(steps).tolist() if steps else [] for steps in self._decode]

    def dense_head_counts(self) -> list[list[list[int]]]:
        """The same of the heads that are left dense; no steps in layers without any."""
        return [torch.stack(steps).tolist() if steps else [] for steps in self._decode_dense]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        backbone = self._backbone
        return 2 * backbone.num_layers * backbone.num_kv_heads * backbone.head_dim * backbone.dtype.itemsize

    def kept_bytes(self) -> list[int]:
        """Bytes of keys and values kept for each sample."""
        layer_bytes = self.row_bytes // self._backbone.num_layers
        kept = [num_kept(cache) for cache in self._caches if cache is not None]
        return [sum(layer) * layer_bytes for layer in zip(*kept, strict=True)] if kept else [0] * len(self._lengths)

    # --- one layer ------------------------------------------------------------------------------------------

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """There are no bookmarks."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        rope, method = self._backbone.rope(layer), self._own.get(layer, self._method)
        q, k = (unscaled(x, rope.scaling, rope.rotary_dims) for x in (q, k))
        new = self._new[self._backbone.layers[layer].device]
        cache = self._caches[layer] or empty_cache(k, v)
        self._caches[layer] = cache
        if self._num_again:
            drop_last(cache, self._num_again)
        if cache.num_places:
            places = method.keep(cache, new, self._kv_budget)
            if places is not None:
                take(cache, places)
        append(cache, k, v, new.true_BQ)
        heads, question = self._dense_heads[layer], self.questions.get(layer)
        view = ChunkView(layer, self._kv_budget, cache, q, new, rope.at, heads, question, self._shared)
        done = method.attend_prompt(view, scale, softcap, self._window(layer))
        if done is not None:
            self._account(view, done[1])
            return done[0].transpose(1, 2)
        parts = method.select(view)
        if parts is None:
            return self._attend_all(view, scale, softcap)
        return self._attend_parts(view, method, parts, scale, softcap)

    def _window(self, layer: int) -> int | None:
        """The model's own window in layers that choose; the others keep it as their method."""
        return None if layer in self._own else self._backbone.layers[layer].window

    def _attend_all(self, view: ChunkView, scale: float, softcap: float | None) -> Tensor:
        """All tokens so far, at true positions."""
        window = self._window(view.layer)
        counts_BQ = view.true_BQ + 1
        self._account(view, (counts_BQ if window is None else counts_BQ.clamp(max=window))[:, None])
        cache, true_BT = view.cache, view.cache.true_BJT[:, 0]
        q = _placed(view.q_BHQD, view.true_BQ.clamp(min=0)[:, None], view)
        k = _placed(cache.keys_BKTD, true_BT.clamp(min=0)[:, None], view)
        rows = [x.transpose(1, 2) for x in (q, k, cache.values_BKTD)]
        if view.new.is_prefill and window is None:  # places are positions, and padding stands behind all
            return attend(rows[0], rows[1], rows[2], None, scale, softcap, causal=True)
        apart = view.true_BQ[:, :, None] - true_BT[:, None]
        allowed = (apart >= 0) & (true_BT >= 0)[:, None]
        if window is not None:
            allowed &= apart < window
        allowed |= ~allowed.any(-1, keepdim=True)
        return attend(rows[0], rows[1], rows[2], bias_from(allowed, q.dtype), scale, softcap)

    def _attend_parts(
        self, view: ChunkView, method: TokenMethod, parts: list[Part], scale: float, softcap: float | None
    ) -> Tensor:
        parts = [self._within_window(view.layer, part) for part in parts]
        counts_BJQ = sum((part.allowed_BJQS.sum(-1) for part in parts[1:]), parts[0].allowed_BJQS.sum(-1))
        self._account(view, counts_BJQ)
        sets = [_key_set(view, part) for part in parts]
        if method.num_revised and not view.new.is_prefill:
            out, lse = attend_sets_lse(sets, scale, softcap)
            return method.merge(view, out, lse).to(view.q_BHQD.dtype).transpose(1, 2)
        if not method.needs_weights:
            return attend_sets(sets, scale, softcap).transpose(1, 2)
        out, weights = attend_sets_reference(sets, scale, softcap)
        real = (view.true_BQ >= 0)[:, None, :, None]
        method.observe(view, parts, [part.masked_fill(~real, 0.0) for part in weights])
        return out.transpose(1, 2)

    def _within_window(self, layer: int, part: Part) -> Part:
        """Where all layers of a model slide, no token looks further than the window, as tokens are placed."""
        window = self._window(layer)
        if window is None:
            return part
        apart = part.q_positions_BQ[:, None, :, None] - part.k_positions_BJS[:, :, None]
        allowed = part.allowed_BJQS & (apart < window)
        return dataclasses.replace(part, allowed_BJQS=allowed)

    def _account(self, view: ChunkView, counts_BJQ: Tensor) -> None:
        """Note what this chunk attends, padding aside; what is counted is what attention is given."""
        counts_BJQ = counts_BJQ.masked_fill((view.true_BQ < 0)[:, None], 0)
        dense = view.dense_heads
        if not view.new.is_prefill and dense is not None:
            counts_BJQ = counts_BJQ.expand(-1, len(dense), -1)
            self._decode_dense[view.layer].append(counts_BJQ.masked_fill(~dense[:, None], 0).amax((1, 2)))
            counts_BJQ = counts_BJQ.masked_fill(dense[:, None], 0)
        most_B = counts_BJQ.amax((1, 2))
        if not view.new.is_prefill:
            self._decode[view.layer].append(most_B)
            return
        so_far = self._prefill[view.layer]
        self._prefill[view.layer] = most_B if so_far is None else torch.maximum(so_far, most_B)


def _by_layer(backbone: Backbone, dense_heads_LK: Tensor | None) -> list[Tensor | None]:
    """The heads that each layer leaves dense, on its device; None where there is none."""
    if dense_heads_LK is None:
        return [None] * backbone.num_layers
    layers = zip(backbone.layers, dense_heads_LK, strict=True)
    return [heads.to(info.device) if bool(heads.any()) else None for info, heads in layers]


def _own_window(backbone: Backbone, layer: int) -> SlidingWindow:
    return SlidingWindow(SlidingWindow.Knobs(backbone.layers[layer].window or 1))


def _placed(x_BHTD: Tensor, positions_BJT: Tensor, view: ChunkView) -> Tensor:
    """Rows rotated to positions."""
    cos, sin = view.rope(positions_BJT)
    return rotate(x_BHTD, cos, sin)


def _key_set(view: ChunkView, part: Part) -> KeySet:
    cache, standins = view.cache, part.standins
    q = _placed(view.q_BHQD, part.q_positions_BQ[:, None], view)
    if standins is not None:
        return KeySet(q, standins.keys_BKSD, standins.values_BKSD, part.allowed_BJQS, standins.log_counts_BJS)
    keys, values = cache.keys_BKTD, cache.values_BKTD
    if part.places_BJS is not None:
        keys, values = gather_rows(keys, part.places_BJS), gather_rows(values, part.places_BJS)
    return KeySet(q, _placed(keys, part.k_positions_BJS, view), values, part.allowed_BJQS)


# --- passes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_prompts(
    backbone: Backbone, stream: TokenStream, prompts: Sequence[Sequence[int]], pad_id: int, logits: bool = False
) -> list[Tensor]:
    """Read prompts side by side, chunk by chunk, inside `Attachment.run`; call `end_prefill` behind the last.

    Returns:
        With `logits`, the next-token logits of each chunk, [B, Q, vocabulary]; else nothing.
    """
    size, found = stream.chunk_tokens(), []
    for start in range(0, max(map(len, prompts), default=0), size):
        rows = [ids[start : start + size] for ids in prompts]
        tokens = torch.full((len(rows), max(map(len, rows))), pad_id)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        stream.begin([len(ids) for ids in rows], is_prefill=True)
        inputs = backbone.embed(tokens)
        arguments: dict[str, Any] = {
            "inputs_embeds": inputs,
            "position_ids": torch.zeros(tokens.shape, dtype=torch.int64, device=inputs.device),
            "use_cache": False,
        }
        if logits:
            found.append(backbone.model(**arguments).logits)
        else:
            backbone.decoder(**arguments)
    return found


@contextmanager
def generating(backbone: Backbone, stream: TokenStream, num_samples: int) -> Iterator[None]:
    """While `generate` runs: every pass begins a step of one token per sample, at position 0 for the stock model, with
    the tokens before it that the method revises."""

    again: list[Tensor] = []

    def before_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
        newest = kwargs[name]
        inputs = torch.cat([*again, newest], 1)
        stream.begin([inputs.shape[1]] * num_samples, is_prefill=False, num_again=len(again))
        if again:
            # Newer transformers hand it over as `cache`.
            cache = kwargs.get("cache") or kwargs["past_key_values"]
            cache.crop(cache.get_seq_length() - len(again))
        again.append(newest)
        del again[: max(len(again) - stream.num_revised, 0)]
        zeros = torch.zeros(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
        return args, {**kwargs, name: inputs, "position_ids": zeros}

    def after_pass(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state[:, -1:]
        return out

    handles = [
        backbone.decoder.register_forward_pre_hook(before_pass, with_kwargs=True),
        backbone.decoder.register_forward_hook(after_pass),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
