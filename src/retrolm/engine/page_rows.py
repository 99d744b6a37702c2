"""Rows of a chunk: packed for the stock layers and for attention, which then work on no padding; page by page for what
is stored and scored.

Shape letters: T tokens of the chunk, N pages, Q places of each, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .chunk import Chunk


class TokenRows(NamedTuple):
    """The tokens of some pages behind each other: what attention reads, before RoPE, and where it writes."""

    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    out_THD: Tensor


class PageRows:
    """Between [T, H, D] and [N, Q, H, D]; the same memory where all pages are equally long.

    Attributes:
        num_tokens: T.
    """

    def __init__(self, chunk: Chunk) -> None:
        self._shape = (chunk.num_pages, chunk.width)
        lengths = chunk.page_lengths()
        self._bounds = [0, *accumulate(lengths.tolist())]
        inside = torch.arange(chunk.width) < lengths[:, None]
        self._places = inside.flatten().nonzero().flatten(), (~inside).flatten().nonzero().flatten()
        self.num_tokens = len(self._places[0])
        self._has_padding = self.num_tokens < inside.numel()
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def by_page(self, x_THD: Tensor) -> Tensor:
        """Rows page by page, zeros behind short pages: masked keys and values must be finite."""
        if not self._has_padding:
            return x_THD.unflatten(0, self._shape)
        rows, holes = self._on(x_THD.device)
        padded = x_THD.new_empty(self._shape[0] * self._shape[1], *x_THD.shape[1:])
        return padded.index_copy_(0, rows, x_THD).index_fill_(0, holes, 0).unflatten(0, self._shape)

    def of_pages(self, pages: slice) -> slice:
        """Where the tokens of consecutive pages stand."""
        return slice(self._bounds[pages.start], self._bounds[pages.stop])

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places, in the padded rows, of tokens and of what is no token."""
        if device not in self._there:
            tokens, holes = self._places
            self._there[device] = tokens.to(device, non_blocking=True), holes.to(device, non_blocking=True)
        return self._there[device]
