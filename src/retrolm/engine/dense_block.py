"""Pages that leave nothing out attend as one causal block: the stock model's own attention below the budget.

Shape letters: n pages of the block, P all pages up to its end, Q rows of each, T tokens, W page size, H, K, D heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.attention import attend, bias_from, head_major
from ..ops.rotary import rotate
from .chunk import PageGroup
from .group_tensors import GroupTensors
from .layer_call import LayerCall
from .prefill_parts import PrefillParts


class DenseBlock:
    """The first pages of a text group, where each attends everything before it.

    Args:
        num_pages: how many pages of `group` the block has.

    Attributes:
        num_tokens: T, all tokens up to the block's end.
    """

    def __init__(self, parts: PrefillParts, group: PageGroup, num_pages: int) -> None:
        self._parts = parts
        self._lengths = group.lengths[:num_pages, 0]
        self._num_all = group.num_past[0] + num_pages
        table = group.table
        self._places = _places(table.lengths[: self._num_all], table.starts[: self._num_all], table.page_size)
        self.num_tokens = len(self._places)
        self._there: dict[tuple[str, torch.device], Tensor | slice] = {}
        self._masks: dict[tuple[int, torch.device], Tensor] = {}

    def attend(self, call: LayerCall, on: GroupTensors, q_nQHD: Tensor, out_nQHD: Tensor) -> None:
        """Fill the rows of `out_nQHD` that hold tokens."""
        backbone = self._parts.backbone
        found = self._parts.store.read(call.layer, on.table_ids[: self._num_all])
        places = self._on("places", self._places, q_nQHD.device)
        keys, values = (x.to(backbone.dtype).flatten(0, 1)[places][None] for x in found)
        rows = self._on("rows", self._rows(q_nQHD.shape[1]), q_nQHD.device)
        q = q_nQHD.flatten(0, 1)[rows][None]
        cos, sin = (x[:, None] for x in backbone.rope(call.layer).at(torch.arange(self.num_tokens, device=q.device)))
        keys = rotate(keys, cos, sin, out=head_major(keys))
        first = self.num_tokens - q.shape[1]
        q = rotate(q, cos[first:], sin[first:], out=head_major(q))
        bias = self._mask(backbone.layers[call.layer].window, q)
        found_THD = attend(q, keys, values, bias, call.scale, call.softcap, causal=bias is None)[0]
        out_nQHD.flatten(0, 1)[rows] = found_THD

    def _rows(self, width: int) -> Tensor:
        """Which rows of the block's pages, each of `width`, hold tokens."""
        return _places(self._lengths, torch.zeros_like(self._lengths), width)

    def _on(self, name: str, places: Tensor, device: torch.device) -> Tensor | slice:
        """Places as a slice where they have no holes, else on the device."""
        key = (name, device)
        if key not in self._there:
            first, last = int(places[0]), int(places[-1])
            whole = last - first + 1 == len(places)
            self._there[key] = slice(first, last + 1) if whole else places.to(device, non_blocking=True)
        return self._there[key]

    def _mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Additive mask [1, own tokens, T] of a sliding window, or None where none of the block is out of its sight."""
        if window is None or window >= self.num_tokens:
            return None
        key = (window, like.device)
        if key not in self._masks:
            places = torch.arange(self.num_tokens, device=like.device)
            distance = places[-like.shape[1] :, None] - places
            self._masks[key] = bias_from((distance >= 0) & (distance < window), like.dtype)[None]
        return self._masks[key]


def _places(lengths_P: Tensor, starts_P: Tensor, size: int) -> Tensor:
    """Places, in a row of pages of `size` each, that hold tokens."""
    inside = torch.arange(size)
    held = (inside >= starts_P[:, None]) & (inside < (starts_P + lengths_P)[:, None])
    return held.flatten().nonzero().flatten()
