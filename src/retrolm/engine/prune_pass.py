"""One `generate` call of a method that prunes: dense attention to the prompt, then to what its method keeps.

Each layer's keys and values are cut down as soon as its attention is done, so no two layers hold a whole prompt. Rows
of a batch are padded at the left; each is attended, scored and pruned by itself, without its padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..methods.base import BudgetError
from ..methods.prune_base import PromptStates, PruneMethod
from ..ops.attention import attend, bias_from
from ..ops.causal import causal_attention
from ..ops.rotary import rotate
from .backbone import Backbone
from .kept_cache import KeptCache


@dataclass(frozen=True)
class PrunePrompt:
    """Token ids of one prompt; its last `num_question` tokens are the question."""

    ids: list[int]
    num_question: int


@dataclass
class Kept:
    """What a layer keeps of one prompt: keys, values [1, K, n, D] and positions int64 [1, K, n]."""

    k: Tensor
    v: Tensor
    positions: Tensor


class PrunePass:
    """Attention while a batch of prompts is read and answered (a `Program`).

    Args:
        kv_budget: tokens of a prompt that each layer keeps, on average over the layers that are pruned.

    Attributes:
        kept: tokens kept of each prompt, [layer][sample].
        attended: most keys that a generated token saw, [step][layer][sample]; a step is one generated token but the
            first, which the dense prefill gives.

    Raises:
        UserError: a budget that the method can't work with.
    """

    uses_stock_rope = True

    def __init__(
        self, backbone: Backbone, method: PruneMethod, cache: KeptCache, prompts: Sequence[PrunePrompt], kv_budget: int
    ) -> None:
        self._backbone = backbone
        self._method = method
        self._cache = cache
        self._lengths = [len(prompt.ids) for prompt in prompts]
        self._apart = [prompt.num_question if method.knobs.question_agnostic else 0 for prompt in prompts]
        self._budgets = [
            self._layer_budgets(*sizes, kv_budget) for sizes in zip(self._lengths, self._apart, strict=True)
        ]
        self._positions: dict[int, Tensor] = {}
        self._starts: dict[int, Tensor] = {}
        self.kept: list[list[int]] = []
        self.attended: list[list[list[int]]] = []

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """There are no bookmarks here."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        if self._cache.is_kept(layer):
            return self._decode(layer, q, k, v, scale, softcap).transpose(1, 2)
        return self._prefill(layer, q, k, v, scale, softcap).transpose(1, 2)

    def _layer_budgets(self, num_tokens: int, num_apart: int, kv_budget: int) -> list[int]:
        """Tokens that each layer keeps of what is pruned; a sliding layer of a mixed model keeps its window."""
        if num_apart >= min(kv_budget, num_tokens):
            raise UserError(
                f"The question has {num_apart} tokens, which leaves nothing of kv_budget={kv_budget} for the text "
                f"before it ({num_tokens - num_apart} tokens). Use a larger budget, or question_agnostic=False."
            )
        num_pruned, infos = num_tokens - num_apart, self._backbone.layers
        pruned = [layer for layer in range(len(infos)) if self._backbone.retrieves(layer)]
        budgets = self._method.layer_budgets(num_pruned, len(pruned), kv_budget - num_apart)
        sizes = [min(info.window or num_pruned, num_pruned) for info in infos]
        for layer, size in zip(pruned, budgets, strict=True):
            sizes[layer] = size
        return sizes

    # --- prompt ---------------------------------------------------------------------------------------------------

    def _prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        out, found = torch.zeros_like(q), []
        repeats = len(q) // len(self._lengths)
        for row in range(len(q)):
            sample = row // repeats
            own = (slice(row, row + 1), slice(None), slice(q.shape[2] - self._lengths[sample], None))
            window = self._backbone.layers[layer].window
            states = PromptStates(layer, q[own], k[own], v[own], scale, softcap, window)
            out[own], kept = self._read(states, sample)
            found.append(kept)
        self._hold(layer, found, repeats)
        return out

    def _read(self, states: PromptStates, sample: int) -> tuple[Tensor, Kept]:
        """Attention output of one prompt [1, H, T, D], and what stays of it."""
        num_apart = self._apart[sample]
        first = _part(states, slice(0, states.num_tokens - num_apart))
        out = causal_attention(first.q_BHTD, first.k_BKTD, first.v_BKTD, states.scale, states.softcap, states.window)
        kept = self._prune(first, self._budgets[sample][states.layer])
        if not num_apart:
            return out, kept
        rest = _part(states, slice(states.num_tokens - num_apart, None))
        places = torch.arange(first.num_tokens, states.num_tokens, device=out.device).expand(
            *kept.positions.shape[:2], -1
        )
        k, v = torch.cat([kept.k, rest.k_BKTD], 2), torch.cat([kept.v, rest.v_BKTD], 2)
        kept = Kept(k, v, torch.cat([kept.positions, places], 2))
        bias = _bias(kept.positions, places, states.window, None, out.dtype)
        answer = _attend_kept(rest.q_BHTD, k, v, bias, states.scale, states.softcap)
        return torch.cat([out, answer], 2), kept

    def _prune(self, states: PromptStates, num_kept: int) -> Kept:
        T = states.num_tokens
        if self._backbone.retrieves(states.layer):
            places = self._method.compress(states, num_kept)
        else:
            places = torch.arange(T - num_kept, T, device=states.k_BKTD.device).expand(*states.k_BKTD.shape[:2], -1)
        index = places[..., None].expand(-1, -1, -1, states.k_BKTD.shape[-1])
        k, v = states.k_BKTD.gather(2, index), states.v_BKTD.gather(2, index)
        if not self._method.compact_positions or num_kept == T:
            return Kept(k, v, places)
        positions = torch.arange(T - num_kept, T, device=places.device).expand_as(places)
        return Kept(self._moved(states.layer, k, positions - places), v, positions)

    def _moved(self, layer: int, k_BKTD: Tensor, distance: Tensor) -> Tensor:
        """Keys turned on by `distance` positions; they hold RoPE's own scaling already."""
        rope = self._backbone.rope(layer)
        rope.require(int(distance.max()) + 1)
        wide = torch.promote_types(k_BKTD.dtype, torch.float32)
        cos, sin = (x.to(wide) / rope.scaling for x in rope.at(distance))
        return rotate(k_BKTD.to(wide), cos, sin).to(k_BKTD.dtype)

    def _hold(self, layer: int, found: list[Kept], repeats: int) -> None:
        """Give the cache what stays of all rows, each right-aligned."""
        room = max(kept.k.shape[2] for kept in found)
        self._cache.keep(layer, *(torch.cat([_at_right(x, room) for x in rows]) for rows in _columns(found)))
        self.kept.append([kept.k.shape[2] for kept in found[::repeats]])
        if min(self.kept[-1]) < room:
            self._starts[layer] = torch.tensor([room - kept.k.shape[2] for kept in found], device=found[0].k.device)
        if self._backbone.layers[layer].window is not None:
            self._positions[layer] = torch.cat([_at_right(kept.positions, room, 2) for kept in found])

    # --- answer ---------------------------------------------------------------------------------------------------

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        if layer == 0:
            self.attended.append([])
        num_new = k.shape[2] - max(self.kept[layer])
        if num_new != len(self.attended):
            raise BudgetError(f"Layer {layer} was handed {k.shape[2]} keys, not those that {self._method.name} kept.")
        self.attended[-1].append([kept + num_new for kept in self.kept[layer]])
        return _attend_kept(q, k, v, self._decode_bias(layer, q, num_new), scale, softcap)

    def _decode_bias(self, layer: int, q: Tensor, num_new: int) -> Tensor | None:
        window, starts = self._backbone.layers[layer].window, self._starts.get(layer)
        if window is None and starts is None:
            return None
        if window is None:
            places = torch.arange(max(self.kept[layer]) + num_new, device=q.device).expand(len(q), 1, -1)
        else:
            places = self._places(layer, len(q) // len(self._lengths), num_new)
        return _bias(places, places[..., -1:], window, starts, q.dtype)

    def _places(self, layer: int, repeats: int, num_new: int) -> Tensor:
        """True positions of all keys of a sliding layer, int64 [rows, K, T]."""
        held = self._positions[layer]
        ends = torch.tensor([length for length in self._lengths for _ in range(repeats)], device=held.device)
        new = ends[:, None, None] + torch.arange(num_new, device=held.device)
        return torch.cat([held, new.expand(-1, held.shape[1], -1)], 2)


def _part(states: PromptStates, span: slice) -> PromptStates:
    q, k, v = (x[:, :, span] for x in (states.q_BHTD, states.k_BKTD, states.v_BKTD))
    return PromptStates(states.layer, q, k, v, states.scale, states.softcap, states.window)


def _columns(found: list[Kept]) -> tuple[list[Tensor], list[Tensor]]:
    return [kept.k for kept in found], [kept.v for kept in found]


def _at_right(x: Tensor, room: int, dim: int = -2) -> Tensor:
    """Zeros in front of `x` along its token dimension, up to `room` places."""
    missing = room - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x.new_zeros(shape), x], dim)


def _bias(
    keys_BKT: Tensor, queries_BKQ: Tensor, window: int | None, starts_B: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Additive mask [B, K, Q, T] from positions: nothing later, beyond the window, or in front of a row's start."""
    distance = queries_BKQ[..., None] - keys_BKT[..., None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if starts_B is not None:
        allowed &= torch.arange(keys_BKT.shape[-1], device=keys_BKT.device) >= starts_B[:, None, None, None]
    return bias_from(allowed, dtype)


def _attend_kept(
    q_BHQD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias_BKQT: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention of [B, H, Q, D] queries where each KV head has a set, and so a mask, of its own → [B, H, Q, D]."""
    B, H, Q, D = q_BHQD.shape
    K, T = k_BKTD.shape[1:3]
    q = q_BHQD.reshape(B * K, H // K, Q, D).transpose(1, 2)
    k, v = (x.reshape(B * K, T, 1, D) for x in (k_BKTD, v_BKTD))
    bias = None if bias_BKQT is None else bias_BKQT.expand(B, K, Q, T).reshape(B * K, Q, T)
    return attend(q, k, v, bias, scale, softcap).transpose(1, 2).reshape(B, H, Q, D)
