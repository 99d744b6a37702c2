"""Rows of a chunk: packed for the stock layers and for attention, which then work on no padding; page by page for what
is stored and scored.

Visible bookmarks, which the stock layers get behind all other rows, stand behind their pages in attention and storage.
Shape letters: T tokens of the chunk, N pages, R rows that attention works on (T, or T + N where bookmarks are visible),
Q places of each page, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .chunk import Chunk


class TokenRows(NamedTuple):
    """The rows of some pages behind each other: what attention reads, before RoPE, and where it writes."""

    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    out_THD: Tensor


class PageRows:
    """Between [R, H, D] and [N, Q, H, D]; the same memory where all pages are equally long.

    Attributes:
        num_tokens: T.
    """

    def __init__(self, chunk: Chunk) -> None:
        lengths = chunk.page_lengths()
        width = int(lengths.max())
        self._shape = (chunk.num_pages, width)
        self._bounds = [0, *accumulate(lengths.tolist())]
        inside = torch.arange(width) < lengths[:, None]
        self._places = inside.flatten().nonzero().flatten(), (~inside).flatten().nonzero().flatten()
        self._has_padding = len(self._places[0]) < inside.numel()
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.num_tokens = sum(len(tokens) for group in chunk.groups for tokens in group.tokens)
        self._marks_behind = self.num_tokens < self._bounds[-1]
        self._orders: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def in_order(self, x_THD: Tensor) -> Tensor:
        """The rows that attention works on, of all rows of the forward pass: [R, H, D], a view if it is only tokens."""
        if not self._marks_behind:
            return x_THD[: self.num_tokens]
        return x_THD.index_select(0, self._order(x_THD.device)[0])

    def put_back(self, x_RHD: Tensor, out_THD: Tensor) -> None:
        """Bring the tokens' part of what attention wrote in `in_order` rows into the rows of the forward pass."""
        if self._marks_behind:
            torch.index_select(x_RHD, 0, self._order(x_RHD.device)[1], out=out_THD[: self.num_tokens])

    def by_page(self, x_RHD: Tensor) -> Tensor:
        """Rows page by page, zeros behind short pages: masked keys and values must be finite."""
        if not self._has_padding:
            return x_RHD.unflatten(0, self._shape)
        rows, holes = self._on(x_RHD.device)
        padded = x_RHD.new_empty(self._shape[0] * self._shape[1], *x_RHD.shape[1:])
        return padded.index_copy_(0, rows, x_RHD).index_fill_(0, holes, 0).unflatten(0, self._shape)

    def of_pages(self, pages: slice) -> slice:
        """Where the rows of consecutive pages stand in order."""
        return slice(self._bounds[pages.start], self._bounds[pages.stop])

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places, in the padded rows, of what is a row and of what is none."""
        if device not in self._there:
            tokens, holes = self._places
            self._there[device] = tokens.to(device, non_blocking=True), holes.to(device, non_blocking=True)
        return self._there[device]

    def _order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each row in order its place in the forward pass, and for each token there its place in order."""
        if device not in self._orders:
            is_mark = torch.zeros(self._bounds[-1], dtype=torch.bool)
            is_mark[torch.tensor(self._bounds[1:]) - 1] = True
            order = torch.where(is_mark, self.num_tokens + is_mark.cumsum(0) - 1, (~is_mark).cumsum(0) - 1)
            tokens = (~is_mark).nonzero().flatten()
            self._orders[device] = order.to(device, non_blocking=True), tokens.to(device, non_blocking=True)
        return self._orders[device]


class RunRows:
    """The rows of a few pages behind each other, and page by page: the same memory where all are equally long.

    Args:
        lengths_n: rows of each page, on the host.
    """

    def __init__(self, lengths_n: Tensor, device: torch.device) -> None:
        self._shape = (len(lengths_n), int(lengths_n.max()))
        inside = torch.arange(self._shape[1]) < lengths_n[:, None]
        self._is_ragged = not bool(inside.all())
        # Padding repeats a row before it, which is finite.
        rows, places = inside.flatten().cumsum(0) - 1, inside.flatten().nonzero().flatten()
        self._rows, self._places = (x.to(device, non_blocking=True) for x in (rows, places))

    def padded(self, x_RHD: Tensor) -> Tensor:
        """The rows page by page, [n, Q, H, D]."""
        return (x_RHD.index_select(0, self._rows) if self._is_ragged else x_RHD).unflatten(0, self._shape)

    def room_for(self, out_RHD: Tensor) -> Tensor:
        """Where results may be written page by page, [n, Q, H, D]; `pack` them then."""
        if not self._is_ragged:
            return out_RHD.unflatten(0, self._shape)
        return out_RHD.new_empty(*self._shape, *out_RHD.shape[1:])

    def pack(self, found_nQHD: Tensor, out_RHD: Tensor) -> None:
        """Bring the rows of `room_for` to `out_RHD`, if they are not there."""
        if self._is_ragged:
            torch.index_select(found_nQHD.flatten(0, 1), 0, self._places, out=out_RHD)
