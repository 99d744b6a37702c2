"""Where the tokens of gathered sets stand: their compact positions, their RoPE, and the mask of what isn't there.

Shape letters: n pages handled together, S slots, O own slots, Q query tokens, L gathered tokens, R rotary dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..ops.attention import bias_from, causal_needs_no_mask
from ..paging import place
from .rope_table import RopeTable


@dataclass
class SetLayout:
    """Where the tokens of a gathered set stand, and who may attend them.

    Attributes:
        span: the part of the gathered row [0, S*W) that holds tokens.
        valid_nL: which places hold tokens, bool [n or 1, L]. num_tokens: most tokens of any row, int64 [].
        cos_q, sin_q [n or 1, Q, 1, R]; cos_k, sin_k [n or 1, L, 1, R]: RoPE of queries and keys.
        bias_nQL: additive mask, or None where plain lower-right causal masking says it all.
    """

    span: slice
    valid_nL: Tensor
    num_tokens: Tensor
    cos_q: Tensor
    sin_q: Tensor
    cos_k: Tensor
    sin_k: Tensor
    bias_nQL: Tensor | None

    @cached_property
    def spans(self) -> list[slice]:
        """Of each row of `valid_nL` the part that holds tokens; all of it where only a GPU knows."""
        if self.valid_nL.is_cuda:
            return [slice(0, self.valid_nL.shape[1])] * len(self.valid_nL)
        return [_span(row[None]) for row in self.valid_nL]


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
    left_out_nS: Tensor | None = None,
) -> SetLayout:
    """Lay out [selected pages | own pages] of `n` pages (one row stands for all where they are alike).

    Args:
        past_lengths_nS, past_starts_nS, own_lengths_nO, own_starts_nO, end_n: all on the host, or all on a GPU where
            only it knows which pages were chosen. Then nothing here waits for it, and every place gets its mask.
        own_lengths_nO: own tokens per own slot. own_starts_nO: first own token's place inside its slot.
        end_n: compact position of the first own token.
        device: where the layout is used.
        left_out_nS: by how many tokens more each selected page stands before the own ones; None = none.
    """
    known = not past_lengths_nS.is_cuda
    past = place(past_lengths_nS, past_starts_nS, end_n, page_size)
    own_tokens_n = own_lengths_nO.sum(1)
    own = place(own_lengths_nO, own_starts_nO, end_n + own_tokens_n, page_size)
    valid = torch.cat([past.valid, own.valid], 1)
    span = _span(valid) if known else slice(0, valid.shape[1])
    valid = valid[:, span]
    past_positions = past.positions
    if left_out_nS is not None:
        past_positions = past_positions - left_out_nS.repeat_interleave(page_size, 1)
    positions = torch.cat([past_positions, own.positions], 1)[:, span]
    q_positions = end_n[:, None] + torch.arange(num_queries, device=end_n.device)
    plain = known and _is_plain(valid, positions, own_tokens_n, num_queries, window)
    bias = None
    if not (plain and causal_needs_no_mask(device, dtype)):
        bias = bias_from(_allowed(valid, positions, q_positions, window).to(device, non_blocking=True), dtype)
    cos_q, sin_q = rope.at(q_positions.to(device, non_blocking=True))
    at_keys = rope.at if left_out_nS is None else rope.at_signed
    cos_k, sin_k = at_keys(positions.to(device, non_blocking=True))
    cos_q, sin_q, cos_k, sin_k = (x[:, :, None] for x in (cos_q, sin_q, cos_k, sin_k))
    return SetLayout(span, valid, valid.sum(1).max(), cos_q, sin_q, cos_k, sin_k, bias)


def _allowed(valid_nL: Tensor, positions_nL: Tensor, q_positions_nQ: Tensor, window: int | None) -> Tensor:
    """Which places each query may attend, bool [n, Q, L]."""
    distance = q_positions_nQ[:, :, None] - positions_nL[:, None]
    allowed = valid_nL[:, None] & (distance >= 0)
    if window:
        allowed &= distance < window
    # Rows of padded queries may attend the first token, so that no softmax is empty.
    first = torch.arange(allowed.shape[-1], device=allowed.device) == 0
    return allowed | (~allowed.any(-1, keepdim=True) & first)


def _is_plain(
    valid_nL: Tensor, positions_nL: Tensor, own_tokens_n: Tensor, num_queries: int, window: int | None
) -> bool:
    """Whether every query attends all places up to its own."""
    if not bool(valid_nL.all()) or int(own_tokens_n.min()) < num_queries:
        return False
    return not window or int(positions_nL.max() - positions_nL.min()) < window


def _span(valid_nL: Tensor) -> slice:
    used = valid_nL.any(0).nonzero().flatten()
    return slice(int(used[0]), int(used[-1]) + 1)
