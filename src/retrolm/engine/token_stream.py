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

from ..methods.once import Once
from ..methods.sliding_window import SlidingWindow
from ..methods.token_base import ChunkView, NewTokens, Part, QuestionQueries, TokenCache, TokenMethod, distance
from ..ops.attention import attend, bias_from
from ..ops.joint_attention import attend_sets_lse
from ..ops.rotary import unscaled
from .backbone import Backbone
from .part_attention import attend_parts, attend_weighing, key_set, placed
from .prefill_layers import can_fuse, fused_rows
from .token_cache import align_right, append, at_least_0, drop_last, empty_cache, num_kept, take


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
        devices = {info.device for info in self._backbone.layers}
        self._new = {device: _new_tokens(before, new, device, is_prefill) for device in devices}
        self._lengths = [b + n for b, n in zip(before, new, strict=True)]

    def end_prefill(self) -> None:
        """Line up the samples' caches at their ends, where generated tokens follow."""
        once = Once()
        for cache in self._caches:
            if cache is not None and len(set(self._lengths)) > 1:
                align_right(cache, once)

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
        new.once.next_layer()
        cache = self._grown(layer, method, k, v, new)
        heads, question = self._dense_heads[layer], self.questions.get(layer)
        view = ChunkView(layer, self._kv_budget, cache, q, new, rope.at, heads, question, self._shared)
        done = method.attend_prompt(view, scale, softcap, self._window(layer))
        if done is not None:
            self._account(view, done[1])
            return done[0].transpose(1, 2)
        parts = method.select(view)
        if parts is None:
            return self._attend_all(view, scale, softcap)
        return self._attend_parts(view, method, parts, scale, softcap).transpose(1, 2)

    def _grown(self, layer: int, method: TokenMethod, k: Tensor, v: Tensor, new: NewTokens) -> TokenCache:
        """The layer's cache with the chunk's tokens, and without what the method gives up for them."""
        cache = self._caches[layer] or empty_cache(k, v, new.once)
        self._caches[layer] = cache
        if self._num_again:
            drop_last(cache, self._num_again)
        if cache.num_places:
            places = method.keep(cache, new, self._kv_budget)
            if places is not None:
                take(cache, places, new.once)
        append(cache, k, v, new)
        return cache

    def _window(self, layer: int) -> int | None:
        """The model's own window in layers that choose; the others keep it as their method."""
        return None if layer in self._own else self._backbone.layers[layer].window

    def _attend_all(self, view: ChunkView, scale: float, softcap: float | None) -> Tensor:
        """All tokens so far, at true positions."""
        window, cache, new = self._window(view.layer), view.cache, view.new
        self._account(view, view.once(_num_before, new.true_BQ, window))
        q = placed(view, view.q_BHQD, view.once(at_least_0, new.true_BQ))
        k = placed(view, cache.keys_BKTD, view.once(at_least_0, cache.true_BJT))
        rows = [x.transpose(1, 2) for x in (q, k, cache.values_BKTD)]
        if new.is_prefill and window is None:  # places are positions, and padding stands behind all
            return attend(rows[0], rows[1], rows[2], None, scale, softcap, causal=True)
        bias = view.once(_causal_bias, new.true_BQ, cache.true_BJT, window, q.dtype)
        return attend(rows[0], rows[1], rows[2], bias, scale, softcap)

    def _attend_parts(
        self, view: ChunkView, method: TokenMethod, parts: list[Part], scale: float, softcap: float | None
    ) -> Tensor:
        """[B, H, Q, D]."""
        parts = [self._within_window(view, part) for part in parts]
        self._account(view, view.once(_num_allowed, *(part.allowed_BJQS for part in parts)))
        if method.num_revised and not view.new.is_prefill:
            out, lse = attend_sets_lse([key_set(view, part) for part in parts], scale, softcap)
            return method.merge(view, out, lse).to(view.q_BHQD.dtype)
        if not method.needs_weights:
            return attend_parts(view, parts, scale, softcap)
        out, weights = attend_weighing(view, parts, scale, softcap)
        method.observe(view, parts, weights)
        return out

    def _within_window(self, view: ChunkView, part: Part) -> Part:
        """Where all layers of a model slide, no token looks further than the window, as tokens are placed."""
        window = self._window(view.layer)
        if window is None:
            return part
        allowed = view.once(_in_window, part.allowed_BJQS, part.q_positions_BQ, part.k_positions_BJS, window)
        return dataclasses.replace(part, allowed_BJQS=allowed)

    def _account(self, view: ChunkView, counts_BJQ: Tensor) -> None:
        """Note what this chunk attends, padding aside; what is counted is what attention is given."""
        dense, layer, once = view.dense_heads, view.layer, view.once
        if view.new.is_prefill:
            most_B, so_far = once(_most, counts_BJQ, view.true_BQ, None), self._prefill[layer]
            self._prefill[layer] = most_B if so_far is None else once(torch.maximum, so_far, most_B)
            return
        self._decode[layer].append(once(_most, counts_BJQ, view.true_BQ, None if dense is None else ~dense))
        if dense is not None:
            self._decode_dense[layer].append(once(_most, counts_BJQ, view.true_BQ, dense))


# --- what layers share ------------------------------------------------------------------------------------------


def _new_tokens(before: list[int], new: list[int], device: torch.device, is_prefill: bool) -> NewTokens:
    starts, counts = torch.tensor([before, new]).to(device, non_blocking=True)
    rows = torch.arange(max(new), device=device)
    true = starts[:, None] + rows
    if min(new) < max(new):
        true = true.masked_fill(rows >= counts[:, None], -1)
    return NewTokens(true, before, new, starts, counts, is_prefill)


def _num_before(true_BQ: Tensor, window: int | None) -> Tensor:
    """Keys of each query that attends all or its window, [B, 1, Q]."""
    return (true_BQ + 1).clamp(max=window)[:, None] if window else (true_BQ + 1)[:, None]


def _num_allowed(*allowed_BJQS: Tensor) -> Tensor:
    """Keys of each query, [B, J, Q]."""
    return sum((allowed.sum(-1) for allowed in allowed_BJQS[1:]), allowed_BJQS[0].sum(-1))


def _most(counts_BJQ: Tensor, true_BQ: Tensor, heads_K: Tensor | None) -> Tensor:
    """Most keys that a query of each sample attends, padding aside; of these heads alone, if any are given."""
    counts_BJQ = counts_BJQ.masked_fill((true_BQ < 0)[:, None], 0)
    if heads_K is not None:
        counts_BJQ = counts_BJQ.expand(-1, len(heads_K), -1).masked_fill(~heads_K[:, None], 0)
    return counts_BJQ.amax((1, 2))


def _causal_bias(true_BQ: Tensor, true_B1T: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """For `attend` over the whole cache, [B, Q, T]."""
    apart = distance(true_BQ, true_B1T)[:, 0]
    allowed = apart >= 0 if window is None else (apart >= 0) & (apart < window)
    return bias_from(allowed | ~allowed.any(-1, keepdim=True), dtype)


def _in_window(allowed_BJQS: Tensor, q_positions_BQ: Tensor, k_positions_BJS: Tensor, window: int) -> Tensor:
    return allowed_BJQS & (q_positions_BQ[:, None, :, None] - k_positions_BJS[:, :, None] < window)


def _by_layer(backbone: Backbone, dense_heads_LK: Tensor | None) -> list[Tensor | None]:
    """The heads that each layer leaves dense, on its device; None where there is none."""
    if dense_heads_LK is None:
        return [None] * backbone.num_layers
    layers = zip(backbone.layers, dense_heads_LK, strict=True)
    return [heads.to(info.device) if bool(heads.any()) else None for info, heads in layers]


def _own_window(backbone: Backbone, layer: int) -> SlidingWindow:
    return SlidingWindow(SlidingWindow.Knobs(backbone.layers[layer].window or 1))


# --- passes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_prompts(
    backbone: Backbone, stream: TokenStream, prompts: Sequence[Sequence[int]], pad_id: int, logits: bool = False
) -> list[Tensor]:
    """Read prompts side by side, chunk by chunk, inside `Attachment.run`; call `end_prefill` behind the last.

    Returns:
        With `logits`, the next-token logits of each chunk, [B, Q, vocabulary]; else nothing.
    """
    size, found, fused = stream.chunk_tokens(), [], can_fuse(backbone)
    for start in range(0, max(map(len, prompts), default=0), size):
        rows = [ids[start : start + size] for ids in prompts]
        tokens = torch.full((len(rows), max(map(len, rows))), pad_id)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        stream.begin([len(ids) for ids in rows], is_prefill=True)
        inputs = backbone.embed(tokens)
        if fused and not logits:
            fused_rows(backbone, stream, inputs, wanted=False)
            continue
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
