"""What the layers need of a page group on their device, brought there once and without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk import PageGroup


class GroupTensors:
    """Host knowledge of a group as tensors on one device.

    Attributes:
        table_ids, table_lengths, table_starts: of all pages of the group's table, int64 [P].
        own_ids, own_lengths, own_starts: of the group's own slots, int64 [n, O].
        own_tokens: tokens of each page without its bookmark, int64 [n]. ordinals: pages before each page, int64 [n].
        ends: compact position of each page's first token, int64 [n].
        is_sink: bool [n]. pinned: pages that are always attended, bool [P], or None.
        sink_ids: of the sink pages of each document, int64 [documents * sinks].
        firsts: where the document of each question begins in the table, int64 [n, 1]; empty if none were joined.
        questions: the same of each question that was joined to the group.
    """

    def __init__(self, group: PageGroup, device: torch.device) -> None:
        def there(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        table = group.table
        self.table_ids, self.table_lengths, self.table_starts = map(there, (table.ids, table.lengths, table.starts))
        self.own_ids, self.own_lengths, self.own_starts = map(there, (group.ids, group.lengths, group.own_starts()))
        self.own_tokens = there(torch.tensor([len(tokens) for tokens in group.tokens]))
        self.ordinals = there(torch.tensor(group.num_past))
        self.ends = there(torch.tensor(group.end))
        self.is_sink = there(torch.tensor([past < table.num_sink for past in group.num_past]))
        self.pinned = there(_marked(group.pinned, len(table))) if group.pinned else None
        self.sink_ids = there(torch.cat([part.table.ids[: table.num_sink] for part in group.by_document]))
        self.firsts = there(torch.tensor(group.firsts, dtype=torch.int64)[:, None])
        self.questions = [GroupTensors(question, device) for question in group.questions]


def _marked(places: tuple[int, ...], size: int) -> Tensor:
    marks = torch.zeros(size, dtype=torch.bool)
    marks[list(places)] = True
    return marks
