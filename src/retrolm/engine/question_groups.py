"""Questions on several documents of one store as one group: each layer stores, gathers and attends them together.

Only the choice of pages is made document by document.
"""

from __future__ import annotations

from itertools import accumulate, groupby

import torch

from ..paging import PageTable
from .chunk import Chunk, PageGroup
from .prefill_parts import PrefillParts
from .set_runs import joins_questions


def with_joined_questions(chunk: Chunk, parts: PrefillParts) -> Chunk:
    """The chunk with neighbouring questions as one group, where the device gains from it and their shapes allow it."""
    device = parts.backbone.layers[0].device
    if parts.config.selection_scope == "head" or not joins_questions(device):
        return chunk
    groups: list[PageGroup] = []
    for (is_query, *_), same in groupby(chunk.groups, _kind):
        alike = list(same)
        groups.extend([join_questions(alike)] if is_query and len(alike) > 1 else alike)
    return Chunk(groups, chunk.width)


def join_questions(groups: list[PageGroup]) -> PageGroup:
    """One group of the pages of several questions of a kind; its table holds the documents' pages behind each other."""
    tables = [group.table for group in groups]
    return PageGroup(
        table=_joined_table(tables),
        ids=torch.cat([group.ids for group in groups]),
        lengths=torch.cat([group.lengths for group in groups]),
        num_past=[past for group in groups for past in group.num_past],
        tokens=[tokens for group in groups for tokens in group.tokens],
        room=[room for group in groups for room in group.room],
        end=[end for group in groups for end in group.end],
        is_query=True,
        questions=groups,
        firsts=[0, *accumulate(map(len, tables))][:-1],
    )


def _kind(group: PageGroup) -> tuple[bool, int, tuple[int, ...], int]:
    """What questions must agree in: stored pages of their own, and the sinks that their bookmarks see."""
    table = group.table
    return group.is_query, group.ids.shape[1], tuple(table.lengths[: table.num_sink].tolist()), table.num_sink


def _joined_table(tables: list[PageTable]) -> PageTable:
    first = tables[0]
    ids, lengths = (torch.cat([getattr(table, name) for table in tables]) for name in ("ids", "lengths"))
    joined = PageTable(ids, lengths, first.num_sink, first.page_size)
    joined.starts = torch.cat([table.starts for table in tables])  # each document's sinks stand at the right
    return joined
