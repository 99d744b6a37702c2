"""The bookmark rows of a group in prefill: each sees the sink pages, its own page and itself (D13).

Shape letters: n pages of a group, Q rows of each, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bookmark_attention import attend_bookmarks
from .chunk import PageGroup
from .group_tensors import GroupTensors
from .layer_call import LayerCall
from .prefill_parts import PrefillParts


def attend_bookmark_rows(
    parts: PrefillParts,
    call: LayerCall,
    group: PageGroup,
    on: GroupTensors,
    marks: tuple[Tensor, Tensor, Tensor],
    k_nQKD: Tensor,
    v_nQKD: Tensor,
) -> Tensor:
    """Attention of a group's bookmarks, [n, H, D].

    Args:
        marks: queries [n, H, D], keys and values [n, K, D] of the bookmarks. k_nQKD, v_nQKD: of their pages.
    """
    sinks = _sink_tokens(parts, call.layer, group, on, k_nQKD)
    rope = parts.backbone.rope(call.layer)
    return attend_bookmarks(*marks, k_nQKD, v_nQKD, on.own_tokens, *sinks, on.is_sink, rope, call.scale, call.softcap)


def _sink_tokens(
    parts: PrefillParts, layer: int, group: PageGroup, on: GroupTensors, like_nQKD: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of the sink pages' tokens, [n, tokens, K, D]; none before they were all read."""
    table = group.table
    num_sink = table.num_sink if parts.config.bookmark_span == "sink_page" else 0
    if num_sink == 0 or len(table) < num_sink:
        return like_nQKD[:, :0], like_nQKD[:, :0]
    halves = (x.unflatten(0, (-1, num_sink)) for x in parts.store.read(layer, on.sink_ids))
    lengths = table.lengths[:num_sink].tolist()  # the same for all documents of a group
    keys, values = (
        torch.cat([x[:, i, -length:] for i, length in enumerate(lengths)], 1).to(like_nQKD.dtype) for x in halves
    )
    return keys.expand(len(group), -1, -1, -1), values.expand(len(group), -1, -1, -1)
