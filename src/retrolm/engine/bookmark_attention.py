"""What a bookmark sees: the sink, its own page and itself, at adjacent compact positions (D13).

One function serves prefill and training, so that a bookmark is the same in both.
Shape letters: n bookmarks, S sink tokens, Q places in the own page, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import launch
from ..ops.attention import attend, attend_reference, bias_from
from ..ops.rotary import rotate
from .rope_table import RopeTable


def attend_bookmarks(
    mark_q_nHD: Tensor,
    mark_k_nKD: Tensor,
    mark_v_nKD: Tensor,
    own_k_nQKD: Tensor,
    own_v_nQKD: Tensor,
    own_lengths_n: Tensor,
    sink_k_nSKD: Tensor,
    sink_v_nSKD: Tensor,
    is_sink_n: Tensor,
    rope: RopeTable,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one bookmark per page; all keys before RoPE.

    Args:
        own_lengths_n: tokens of the own page, int64 [n]; later places are ignored, but must be finite.
        is_sink_n: bool [n], pages that are sinks themselves: they see no other sink.

    Returns:
        [n, H, D].
    """
    num_sink = sink_k_nSKD.shape[1]
    parts = (mark_q_nHD, mark_k_nKD, mark_v_nKD, own_k_nQKD, own_v_nQKD, sink_k_nSKD, sink_v_nSKD)
    if _at_once(parts):
        from ..ops.bookmark_kernel import attend_bookmarks as attend_at_once

        found: Tensor = attend_at_once(*parts[:5], own_lengths_n, *parts[5:], is_sink_n, *rope.tables, scale, softcap)
        return found
    device = mark_q_nHD.device
    base_n = torch.where(is_sink_n, 0, num_sink)
    inside = torch.arange(own_k_nQKD.shape[1], device=device)
    sink_positions = torch.arange(num_sink, device=device).expand(len(base_n), -1)
    positions = torch.cat([sink_positions, base_n[:, None] + inside, (base_n + own_lengths_n)[:, None]], 1)
    allowed = torch.cat([~is_sink_n[:, None].expand(-1, num_sink), inside < own_lengths_n[:, None]], 1)
    allowed = torch.cat([allowed, torch.ones_like(allowed[:, :1])], 1)
    cos, sin = rope.at(positions)
    keys = rotate(torch.cat([sink_k_nSKD, own_k_nQKD, mark_k_nKD[:, None]], 1), cos[:, :, None], sin[:, :, None])
    values = torch.cat([sink_v_nSKD, own_v_nQKD, mark_v_nKD[:, None]], 1)
    query = rotate(mark_q_nHD[:, None], cos[:, -1:, None], sin[:, -1:, None])
    if _at_full_precision(parts):
        return attend(query, keys, values, bias_from(allowed[:, None], query.dtype), scale, softcap)[:, 0]
    return attend_reference(query, keys, values, allowed[:, None], scale, softcap)[:, 0]


def _at_full_precision(parts: tuple[Tensor, ...]) -> bool:
    """Whether a processor's own attention rounds no more than the reference, which is written out for gradients."""
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in parts)
    return not parts[0].is_cuda and parts[0].dtype in (torch.float32, torch.float64) and not wants_grad


def _at_once(parts: tuple[Tensor, ...]) -> bool:
    """Whether one kernel can do it: in float32 or less, without gradients, up to 16 query heads per KV head."""
    first, keys = parts[:2]
    plain = not (torch.is_grad_enabled() and any(x.requires_grad for x in parts))
    fits = first.shape[1] <= 16 * keys.shape[1] and all(x.stride(-1) == 1 and x.dtype == first.dtype for x in parts)
    return plain and fits and first.dtype != torch.float64 and launch.runs_on(first)
