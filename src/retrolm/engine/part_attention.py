"""Attention over the parts that a token method selects, in few operations: launching them is what costs.

Masks, angles and places are worked out once for all layers whose parts hold the same tensors. Shape letters as in
`methods.token_base`; E = D times the number of ways in which queries stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..methods.token_base import ChunkView, Part
from ..ops.joint_attention import KeySet, attend_joined, attend_sets, joined_bias, weigh_joined
from ..ops.rotary import rotate
from .token_cache import gather_rows


def attend_parts(view: ChunkView, parts: Sequence[Part], scale: float, softcap: float | None) -> Tensor:
    """Attention of the chunk, [B, H, Q, D]; a query that may attend nothing gives anything."""
    if any(part.standins is not None for part in parts):
        return attend_sets([key_set(view, part) for part in parts], scale, softcap)
    if softcap:
        return attend_weighing(view, parts, scale, softcap)[0]
    joined = _joined(view, parts)
    return attend_joined(joined.q_BHQE, joined.k_BKSE, joined.v_BKSD, _bias(view, parts, view.q_BHQD.dtype), scale)


def attend_weighing(
    view: ChunkView, parts: Sequence[Part], scale: float, softcap: float | None
) -> tuple[Tensor, list[Tensor]]:
    """The same, and the weights of each part, [B, H, Q, S], float32 or wider; zeros for rows of padding."""
    joined, wide = _joined(view, parts), torch.promote_types(view.q_BHQD.dtype, torch.float32)
    bias = _bias(view, parts, wide)
    out, weights = weigh_joined(joined.q_BHQE, joined.k_BKSE, joined.v_BKSD, bias, scale, softcap)
    if view.new.has_padding:
        weights = weights.masked_fill(view.once(_is_padding, view.true_BQ), 0.0)
    return out, list(weights.split([part.allowed_BJQS.shape[3] for part in parts], 3))


def key_set(view: ChunkView, part: Part) -> KeySet:
    """A part by itself."""
    cache, standins = view.cache, part.standins
    q = placed(view, view.q_BHQD, part.q_positions_BQ)
    if standins is not None:
        return KeySet(q, standins.keys_BKSD, standins.values_BKSD, part.allowed_BJQS, standins.log_counts_BJS)
    keys, values = cache.keys_BKTD, cache.values_BKTD
    if part.places_BJS is not None:
        keys, values = gather_rows((keys, values), part.places_BJS, view.once)
    return KeySet(q, placed(view, keys, part.k_positions_BJS), values, part.allowed_BJQS)


def placed(view: ChunkView, rows_BHTD: Tensor, positions: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows rotated to positions, [B, T] or [B, J, T]."""
    cos, sin = view.once(view.rope, positions)
    if positions.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    return rotate(rows_BHTD, cos, sin, out)


# --- all parts side by side -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Joined:
    """Rotated queries, the rotated keys of all parts, and their values."""

    q_BHQE: Tensor
    k_BKSE: Tensor
    v_BKSD: Tensor


def _joined(view: ChunkView, parts: Sequence[Part]) -> _Joined:
    keys, values = _rows(view, parts)
    stands = [list(some) for _, some in groupby(parts, key=lambda part: id(part.q_positions_BQ))]
    ways = [(some[0].q_positions_BQ, _side_by_side(view, [part.k_positions_BJS for part in some])) for some in stands]
    if len(ways) > 1 and view.num_queries == 1:
        q_positions, *k_positions = view.once(_from_one_place, *(x for way in ways for x in way))
        ways = [(q_positions, _side_by_side(view, k_positions))]
    if len(ways) == 1:
        q_positions, k_position = ways[0]
        return _Joined(placed(view, view.q_BHQD, q_positions), placed(view, keys, k_position), values)
    return _several_ways(view, ways, keys, values)


def _several_ways(view: ChunkView, ways: list[tuple[Tensor, Tensor]], keys: Tensor, values: Tensor) -> _Joined:
    """Queries once for each way, side by side along the last axis, and zeros where keys stand another way."""
    width, start = keys.shape[3], 0
    queries = view.q_BHQD.new_empty(*view.q_BHQD.shape[:3], len(ways) * width)
    rotated = keys.new_zeros(*keys.shape[:3], len(ways) * width)
    for i, (q_positions, k_positions) in enumerate(ways):
        channels, end = slice(i * width, (i + 1) * width), start + k_positions.shape[2]
        placed(view, view.q_BHQD, q_positions, queries[..., channels])
        placed(view, keys[:, :, start:end], k_positions, rotated[:, :, start:end, channels])
        start = end
    return _Joined(queries, rotated, values)


def _from_one_place(*positions: Tensor) -> list[Tensor]:
    """One query that stands differently for several sets, put at one place, and their keys moved with it.

    Args:
        positions: of the query [B, 1], and of the keys [B, J, S], for each set.
    """
    stood = positions[::2]
    at = torch.stack(stood).amax(0)
    return [at, *(keys + (at - before)[:, None] for before, keys in zip(stood, positions[1::2], strict=True))]


def _rows(view: ChunkView, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Keys and values of all parts, [B, K, S, D]."""
    rows = view.cache.keys_BKTD, view.cache.values_BKTD
    if len(parts) == 1 and parts[0].places_BJS is None:
        return rows
    everywhere = view.once(_all_places, *rows[0].shape[::2], rows[0].device)
    places = [everywhere if part.places_BJS is None else part.places_BJS for part in parts]
    return gather_rows(rows, _side_by_side(view, places), view.once)


def _all_places(num_samples: int, num_places: int, device: torch.device) -> Tensor:
    return torch.arange(num_places, device=device).expand(num_samples, 1, -1)


def _side_by_side(view: ChunkView, parts: Sequence[Tensor]) -> Tensor:
    found: Tensor = parts[0] if len(parts) == 1 else view.once(_cat, *parts)
    return found


def _cat(*parts_BJS: Tensor) -> Tensor:
    J = max(part.shape[1] for part in parts_BJS)
    return torch.cat([part.expand(-1, J, -1) for part in parts_BJS], 2)


def _bias(view: ChunkView, parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    heads = view.q_BHQD.shape[1], view.cache.keys_BKTD.shape[1]
    found: Tensor = view.once(joined_bias, dtype, heads, *(part.allowed_BJQS for part in parts))
    return found


def _is_padding(true_BQ: Tensor) -> Tensor:
    return (true_BQ < 0)[:, None, :, None]
