"""What the bookmarks of a batch see besides themselves in training, laid out once for all layers (D13).

Keys are turned by their distance to the bookmark, so bookmarks need no rotation of their own: the angles between them
are those of `bookmark_attention.attend_bookmarks`, and the large part of the work takes no gradient.
Shape letters: n bookmarks (B sequences times M pages), Z places of a set, T tokens, K KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.attention import attend, bias_from
from ..ops.rotary import rotate
from .page_batch import PageBatch
from .rope_table import RopeTable

_WIDTH_STEP = 16  # a mask's rows have to be aligned to so many places, or each layer copies it


class BookmarkSets:
    """Which rows each bookmark attends: the sink, its own page and itself.

    Args:
        num_sink: leading tokens of a sequence that are its sink; 0 = no sink.
        dtype: of queries and keys.
    """

    def __init__(self, batch: PageBatch, num_sink: int, dtype: torch.dtype) -> None:
        device = batch.tokens_BT.device
        B, M = batch.lengths_BM.shape
        starts_n1, lengths_n1 = (x.flatten()[:, None] for x in (batch.starts_BM, batch.lengths_BM))
        width = -(-(1 + num_sink + batch.sizes.widest) // _WIDTH_STEP) * _WIDTH_STEP
        columns = torch.arange(width - 1, device=device)
        in_sink, inside = columns < num_sink, columns - num_sink
        is_sink = torch.zeros(B, M, dtype=torch.bool, device=device)
        is_sink[:, 0] = batch.num_prefix == 0
        sees_sink_n1 = ~is_sink.flatten()[:, None]
        own_nZ = starts_n1 + inside.clamp(min=0).minimum(lengths_n1 - 1).clamp(min=0)
        sequence_n1 = torch.arange(B, device=device).repeat_interleave(M, output_size=B * M)[:, None]
        self._rows = (sequence_n1 * batch.tokens_BT.shape[1] + torch.where(in_sink, columns, own_nZ)).flatten()
        allowed_nZ = torch.where(in_sink, sees_sink_n1, inside < lengths_n1)
        allowed_nZ = torch.cat([torch.ones_like(sees_sink_n1), allowed_nZ], 1)
        self._bias_n1Z = bias_from(allowed_nZ[:, None], dtype)
        # The bookmark stands behind its page, which stands behind the sink; a sink's own bookmark sees no other sink.
        self._distance_nZ = torch.where(in_sink, num_sink - columns + lengths_n1, lengths_n1 - inside).clamp(min=0)
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self,
        marks: tuple[Tensor, Tensor, Tensor],
        keys_BTKD: Tensor,
        values_BTKD: Tensor,
        rope: RopeTable,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention of the bookmarks, [n, H, D]; differentiable in them.

        Args:
            marks: queries [n, H, D], keys and values [n, K, D] as the stock layer hands them over at position 0.
            keys_BTKD, values_BTKD: of the frozen pass, before RoPE.
        """
        q, k, v = (x[:, None] for x in marks)
        with torch.no_grad():
            keys, values = self._gathered(keys_BTKD), self._gathered(values_BTKD)
            keys = rotate(keys, *self._turn(rope))
        return attend(
            q, torch.cat([k, keys], 1), torch.cat([v, values], 1), self._bias_n1Z, scale, softcap
        )[:, 0]  # fmt: skip

    def _gathered(self, rows_BTKD: Tensor) -> Tensor:
        """The rows of all sets, [n, Z - 1, K, D]."""
        return rows_BTKD.flatten(0, 1).index_select(0, self._rows).unflatten(0, self._distance_nZ.shape)

    def _turn(self, rope: RopeTable) -> tuple[Tensor, Tensor]:
        """Cos and sin that turn keys back by their distance to the bookmark, [n, Z - 1, 1, R]; layers share them."""
        if id(rope) not in self._turns:
            cos, sin = rope.at(self._distance_nZ)
            self._turns[id(rope)] = cos[:, :, None], -sin[:, :, None]
        return self._turns[id(rope)]
