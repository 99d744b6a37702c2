"""How far before a page the pages stand that it attends, where they keep their distances in the text (D6).

Side by side, all positions are small, however long the text; but the model was trained on texts without such joints.
Shape letters: n attending pages, S slots, P pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import RetroConfig
from .backbone import Backbone
from .chunk import PageGroup


def stands_apart(group: PageGroup, config: RetroConfig) -> bool:
    """Whether a group's pages are to keep their distances, and one of them leaves something out."""
    wanted = config.page_positions == "true" or (config.page_positions == "true_for_questions" and group.is_query)
    past = zip(group.num_past, group.room, strict=True)
    return wanted and any(num - group.table.num_sink > room for num, room in past)


def reach(backbone: Backbone, layer: int, kv_budget: int) -> int:
    """The largest distance of a page to the one that attends it: the layer's window, less room for what follows."""
    rope, window = backbone.rope(layer), backbone.layers[layer].window
    limits = (backbone.window, rope.limit, window)
    return min(limit for limit in limits if limit) - kv_budget


def left_out(picked_nS: Tensor, lengths_nS: Tensor, before_P: Tensor, text_tokens_n: Tensor, most: int) -> Tensor:
    """Tokens of the text between each attended page and the attending one that are not attended, int64 [n, S].

    Where a set with these would reach further than `most`, all of them are shortened in proportion.

    Args:
        picked_nS: pages in ascending order, -1 in empty slots. lengths_nS: their tokens, 0 in empty slots.
        before_P: tokens before each page. text_tokens_n: tokens before each attending page, counted alike.
        most: the largest distance of a page to the first token of the attending one.
    """
    distance_nS = text_tokens_n[:, None] - before_P[picked_nS.clamp(min=0)]
    attended_nS = lengths_nS.flip(1).cumsum(1).flip(1)
    found_nS = (distance_nS - attended_nS).masked_fill(picked_nS < 0, 0)
    farthest_n1 = found_nS.amax(1, keepdim=True).clamp(min=1)
    room_n1 = (most - attended_nS[:, :1]).clamp(min=0)
    return torch.where(farthest_n1 > room_n1, found_nS * room_n1 // farthest_n1, found_nS)
