"""How far before a question the pages stand that it attends, where they keep their distances in the text (D6).

Attended side by side, pages that look alike are easily taken for each other: the model was trained on texts in which
they stand apart. Shape letters: n questions, S slots, P pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backbone import Backbone
from .chunk import PageGroup


def leaves_out(group: PageGroup) -> bool:
    """Whether the group is of questions, of which one can't attend all of its text."""
    past = zip(group.num_past, group.room, strict=True)
    return group.is_query and any(num - group.table.num_sink > room for num, room in past)


def reach(backbone: Backbone, layer: int, kv_budget: int) -> int:
    """The largest distance of a page to a question's first token: the layer's window, less room for what follows."""
    rope, window = backbone.rope(layer), backbone.layers[layer].window
    limits = (backbone.window, rope.limit, window)
    return min(limit for limit in limits if limit) - kv_budget


def left_out(picked_nS: Tensor, lengths_nS: Tensor, before_P: Tensor, text_tokens_n: Tensor, most: int) -> Tensor:
    """Tokens of the text between each attended page and the question that are not attended, int64 [n, S].

    Where a set with these would reach further than `most`, all of them are shortened in proportion.

    Args:
        picked_nS: pages in ascending order, -1 in empty slots. lengths_nS: their tokens, 0 in empty slots.
        before_P: tokens before each page. text_tokens_n: tokens before each question, counted alike.
        most: the largest distance of a page to the question's first token.
    """
    distance_nS = text_tokens_n[:, None] - before_P[picked_nS.clamp(min=0)]
    attended_nS = lengths_nS.flip(1).cumsum(1).flip(1)
    found_nS = (distance_nS - attended_nS).masked_fill(picked_nS < 0, 0)
    farthest_n1 = found_nS.amax(1, keepdim=True).clamp(min=1)
    room_n1 = (most - attended_nS[:, :1]).clamp(min=0)
    return torch.where(farthest_n1 > room_n1, found_nS * room_n1 // farthest_n1, found_nS)
