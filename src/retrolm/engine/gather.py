"""Gathered sets: reading selected pages, giving their tokens compact positions, masking what isn't there.

Shape letters: n pages handled together, S slots, Q query tokens, L gathered tokens, R rotary dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.attention import bias_from
from ..paging import place
from .rope_table import RopeTable


@dataclass
class SetLayout:
    """Where the tokens of a gathered set stand, and who may attend them.

    Attributes:
        span: the part of the gathered row [0, S*W) that holds tokens.
        valid_nL: which places hold tokens, bool [n or 1, L]. num_tokens: most tokens of any row.
        cos_q, sin_q [n or 1, Q, 1, R]; cos_k, sin_k [n or 1, L, 1, R]: RoPE of queries and keys.
        bias_nQL: additive mask, or None where plain lower-right causal masking says it all.
    """

    span: slice
    valid_nL: Tensor
    num_tokens: int
    cos_q: Tensor
    sin_q: Tensor
    cos_k: Tensor
    sin_k: Tensor
    bias_nQL: Tensor | None


def lay_out(
    past_lengths_nS: Tensor,
    past_starts_nS: Tensor,
    own_lengths_nO: Tensor,
    own_starts_nO: Tensor,
    end_n: Tensor,
    num_queries: int,
    page_size: int,
    rope: RopeTable,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> SetLayout:
    """Lay out [selected pages | own pages] of `n` pages (one row stands for all where they are alike).

    Args:
        past_lengths_nS, past_starts_nS, own_lengths_nO, own_starts_nO, end_n: on the CPU, so that nothing
            here waits for a GPU.
        own_lengths_nO: own tokens per own slot. own_starts_nO: first own token's place inside its slot.
        end_n: compact position of the first own token.
        device: where the layout is used. The mask is built there even where causal masking would do, unless it is
            CUDA, which has a fused path for that.
    """
    past = place(past_lengths_nS, past_starts_nS, end_n, page_size)
    own_tokens_n = own_lengths_nO.sum(1)
    own = place(own_lengths_nO, own_starts_nO, end_n + own_tokens_n, page_size)
    valid = torch.cat([past.valid, own.valid], 1)
    span = _span(valid)
    valid = valid[:, span]
    positions = torch.cat([past.positions, own.positions], 1)[:, span]
    q_positions = end_n[:, None] + torch.arange(num_queries)
    cos_q, sin_q = rope.at(q_positions.to(device))
    cos_k, sin_k = rope.at(positions.to(device))
    plain = bool(valid.all()) and int(own_tokens_n.min()) == num_queries and not (window and _wider(positions, window))
    bias = None
    if not plain or device.type != "cuda":
        distance = q_positions[:, :, None] - positions[:, None]
        allowed = valid[:, None] & (distance >= 0)
        if window:
            allowed &= distance < window
        # Rows of padded queries may attend the first token, so that no softmax is empty.
        allowed |= ~allowed.any(-1, keepdim=True) & (torch.arange(allowed.shape[-1]) == 0)
        bias = bias_from(allowed.to(device), dtype)
    num_tokens = int(valid.sum(1).max())
    cos_q, sin_q, cos_k, sin_k = (x[:, :, None] for x in (cos_q, sin_q, cos_k, sin_k))
    return SetLayout(span, valid, num_tokens, cos_q, sin_q, cos_k, sin_k, bias)


def _span(valid_nL: Tensor) -> slice:
    used = valid_nL.any(0).nonzero().flatten()
    return slice(int(used[0]), int(used[-1]) + 1)


def _wider(positions_nL: Tensor, window: int) -> bool:
    return int(positions_nL.max() - positions_nL.min()) >= window
