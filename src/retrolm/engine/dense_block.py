"""Pages that leave nothing out attend as one causal block: the stock model's own attention below the budget.

Shape letters: P all pages up to the block's end, T tokens, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.attention import attend, bias_from, head_major
from ..ops.rotary import rotate
from .chunk import PageGroup
from .group_tensors import GroupTensors
from .layer_call import LayerCall
from .page_rows import TokenRows
from .prefill_parts import PrefillParts
from .rope_table import RopeTable


class DenseBlock:
    """The first pages of a text group, where each attends everything before it.

    Args:
        num_pages: how many pages of `group` the block has.

    Attributes:
        num_tokens: T, all tokens up to the block's end.
    """

    def __init__(self, parts: PrefillParts, group: PageGroup, num_pages: int) -> None:
        self._parts = parts
        self._num_all = group.num_past[0] + num_pages
        table = group.table
        self._places = _places(table.lengths[: self._num_all], table.starts[: self._num_all], table.page_size)
        self.num_tokens = len(self._places)
        self._there: dict[torch.device, Tensor | slice] = {}
        self._cos_sin: dict[RopeTable, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, torch.device], Tensor] = {}

    def attend(self, call: LayerCall, on: GroupTensors, rows: TokenRows) -> None:
        """Fill the output of the block's `rows`."""
        backbone = self._parts.backbone
        keys, values, q = *self._past_and_own(call.layer, on, rows), rows.q_THD[None]
        cos, sin = self._angles(call.layer)
        keys = rotate(keys, cos, sin, out=head_major(keys))
        first = self.num_tokens - q.shape[1]
        q = rotate(q, cos[first:], sin[first:], out=head_major(q))
        bias = self._mask(backbone.layers[call.layer].window, q)
        attend(q, keys, values, bias, call.scale, call.softcap, causal=bias is None, out=rows.out_THD[None])

    def _past_and_own(self, layer: int, on: GroupTensors, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """Keys and values [1, T, K, D]; as they come where nothing is before them and the store changes nothing."""
        dtype, layout = self._parts.backbone.dtype, self._parts.store.layout
        if len(rows.k_TKD) == self.num_tokens and layout.bits == 16 and layout.dtype == dtype:
            return rows.k_TKD[None], rows.v_TKD[None]
        found = self._parts.store.read(layer, on.table_ids[: self._num_all])
        places = self._on(rows.k_TKD.device)
        keys, values = (x.to(dtype).flatten(0, 1)[places][None] for x in found)
        return keys, values

    def _angles(self, layer: int) -> tuple[Tensor, Tensor]:
        """Cos and sin [T, 1, R] of all positions, looked up once for all layers of a kind."""
        backbone = self._parts.backbone
        rope = backbone.rope(layer)
        if rope not in self._cos_sin:
            cos, sin = rope.at(torch.arange(self.num_tokens, device=backbone.layers[layer].device))
            self._cos_sin[rope] = cos[:, None], sin[:, None]
        return self._cos_sin[rope]

    def _on(self, device: torch.device) -> Tensor | slice:
        """The stored tokens' places as a slice where they have no holes, else on the device."""
        if device not in self._there:
            first, last = int(self._places[0]), int(self._places[-1])
            whole = last - first + 1 == len(self._places)
            self._there[device] = slice(first, last + 1) if whole else self._places.to(device, non_blocking=True)
        return self._there[device]

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
