"""Runs of pages whose gathered sets look alike, so that one layout and one attention call serve them all.

Shape letters: n pages of a run, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from .chunk import PageGroup
from .gather import SetLayout

# A CPU works fastest on as many pages' sets as its caches hold, a GPU on as many as fill it.
_CPU_BYTES, _MOST_BYTES = 2**23, 2**27


@dataclass
class SetRun:
    """Consecutive pages of a group with sets of one size and equal own lengths, or pages of several questions.

    Attributes:
        rows: which pages of the group. size: pages each attends before itself, at most.
        alike: pages, int64 [1 or n, S] on the host, that take up the same room as those attended (one row stands for
            all), -1 where a slot is empty; None where that depends on the choice.
        layouts: of `alike`, by what layers differ in.
    """

    rows: slice
    size: int
    alike: Tensor | None
    layouts: dict[tuple[object, ...], SetLayout] = field(default_factory=dict)


def set_runs(
    group: PageGroup, sizes: Sequence[int], first: int, num_local: int, by_choice: bool, most: int
) -> list[SetRun]:
    """Cut the pages of `group` from row `first` on into runs.

    Args:
        sizes: pages each page attends before itself.
        num_local: most recent pages that are always attended.
        by_choice: pages are chosen; else the most recent ones are attended (sliding layers).
        most: pages per run (`most_pages`).
    """
    own_tokens, lengths = group.lengths.sum(1).tolist(), group.table.lengths.tolist()
    short = [page for page, length in enumerate(lengths) if length != group.table.page_size]
    rows_left = range(first, len(group))
    alike = [_alike(group, row, sizes[row], num_local, short) if by_choice else None for row in rows_left]
    shapes = [None if pages is None else tuple(lengths[page] for page in pages) for pages in alike]
    kinds = list(zip(sizes[first:], own_tokens[first:], group.end[first:], shapes, strict=True))
    runs, start = [], first
    for (size, *_), same in groupby(kinds):
        stop = start + len(list(same))
        for at in range(start, stop, most):
            rows = slice(at, min(at + most, stop))
            runs.append(SetRun(rows, size, _row(alike[at - first]) if by_choice else _recent(group, rows, size)))
        start = stop
    return runs


def joint_runs(group: PageGroup, sizes: Sequence[int], num_local: int, by_choice: bool, most: int) -> list[SetRun]:
    """Runs of several questions' pages, whose sets differ in size and room; arguments as in `set_runs`."""
    alike = []
    for question, size, first in zip(group.questions, sizes, group.firsts, strict=True):
        pages = set_runs(question, [size], 0, num_local, by_choice, 1)[0].alike
        alike.append(None if pages is None else pages[0] + first)
    cuts = [slice(at, min(at + most, len(group))) for at in range(0, len(group), most)]
    return [SetRun(rows, max(sizes[rows]), _rows(alike[rows], max(sizes[rows]))) for rows in cuts]


def joins_questions(device: torch.device) -> bool:
    """Whether questions on several documents are worked on together: where launches, not caches, set the pace."""
    return device.type != "cpu"


def most_pages(device: torch.device, set_bytes: int) -> int:
    """How many pages one attention call should serve, whose gathered keys and values take `set_bytes` each."""
    return max(1, (_CPU_BYTES if device.type == "cpu" else _MOST_BYTES) // set_bytes)


def _alike(group: PageGroup, row: int, size: int, num_local: int, short: Sequence[int]) -> list[int] | None:
    """S pages with the lengths of those that page `row` will choose, or None if these can differ.

    Args:
        short: pages of the table that aren't full.
    """
    table, past = group.table, group.num_past[row]
    num_sink = min(table.num_sink, past)
    certain = num_local if size - num_sink >= num_local + len(group.pinned) else 0
    if size < past and any(num_sink <= page < past - certain for page in short):
        return None
    return [*range(num_sink), *range(past - (size - num_sink), past)]


def _row(pages: list[int] | None) -> Tensor | None:
    return None if pages is None else torch.tensor([pages], dtype=torch.int64)


def _rows(alike: Sequence[Tensor | None], size: int) -> Tensor | None:
    """Sets of several pages below each other, -1 at the left of smaller ones; None if any is unknown."""
    known = [pages for pages in alike if pages is not None]
    if len(known) < len(alike):
        return None
    return torch.stack([torch.nn.functional.pad(pages, (size - len(pages), 0), value=-1) for pages in known])


def _recent(group: PageGroup, rows: slice, size: int) -> Tensor:
    """The `size` pages before each page, int64 [n, S]."""
    return torch.tensor(group.num_past[rows])[:, None] - torch.arange(size, 0, -1)
