"""Rows of a chunk: packed for the stock layers, which then work on no padding; page by page for attention.

Shape letters: T tokens of the chunk, N pages, Q places of each, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk import Chunk


class PageRows:
    """Between [T, H, D] and [N, Q, H, D]; the same memory where all pages are equally long.

    Attributes:
        num_tokens: T.
    """

    def __init__(self, chunk: Chunk) -> None:
        self._shape = (chunk.num_pages, chunk.width)
        inside = torch.arange(chunk.width) < chunk.page_lengths()[:, None]
        self._places = inside.flatten().nonzero().flatten()
        self.num_tokens = len(self._places)
        self._has_padding = self.num_tokens < inside.numel()
        self._there: dict[torch.device, Tensor] = {}

    def by_page(self, x_THD: Tensor) -> Tensor:
        """Rows page by page, zeros behind short pages: masked keys and values must be finite."""
        if not self._has_padding:
            return x_THD.unflatten(0, self._shape)
        padded = x_THD.new_zeros(self._shape[0] * self._shape[1], *x_THD.shape[1:])
        return padded.index_copy_(0, self._on(x_THD.device), x_THD).unflatten(0, self._shape)

    def room(self, packed_THD: Tensor) -> Tensor:
        """Where to write results page by page, before `pack` brings them to `packed_THD`."""
        if not self._has_padding:
            return packed_THD.unflatten(0, self._shape)
        return packed_THD.new_empty(*self._shape, *packed_THD.shape[1:])

    def pack(self, room_NQHD: Tensor, packed_THD: Tensor) -> None:
        """Bring what was written into `room` to its packed place."""
        if self._has_padding:
            packed_THD.copy_(room_NQHD.flatten(0, 1).index_select(0, self._on(room_NQHD.device)))

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._there:
            self._there[device] = self._places.to(device, non_blocking=True)
        return self._there[device]
