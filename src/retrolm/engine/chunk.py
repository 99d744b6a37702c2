"""A chunk: the pages that one forward pass encodes, grouped by document."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from ..config import RetroConfig
from ..paging import PageTable, page_lengths, room_for_past, start_position


@dataclass
class PageGroup:
    """Pages of one document in a chunk: consecutive text pages, or one question page; or those of several questions.

    Attributes:
        table: the document's pages before and (for text pages) in this group.
        ids: store pages of the group's own tokens, int64 [n, O]; O > 1 only for a question longer than a page.
        lengths: own tokens in each of them, int64 [n, O]; a visible bookmark is the last token of its page.
        num_past: pages of `table` before each page.
        tokens: token ids of each page, without its bookmark.
        room: pages besides the sinks each page may attend. end: compact position of each page's first token.
        pinned: ordinals that are always attended besides sink and local pages.
        agreed_P: scores of all past pages in place of each layer's own, float32 [P], on the host.
        last_probe: probe of the group's last page by layer, for causal selection of what follows.
        moves: what `page_records` works out once for all layers.
        questions: the groups that were joined to this one (`question_groups`), if it is one of several questions.
        firsts: where in `table` the document of each of them begins.
    """

    table: PageTable
    ids: Tensor
    lengths: Tensor
    num_past: list[int]
    tokens: list[list[int]]
    room: list[int]
    end: list[int]
    pinned: tuple[int, ...] = ()
    is_query: bool = False
    agreed_P: Tensor | None = None
    last_probe: dict[int, Tensor] = field(default_factory=dict)
    moves: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    questions: list[PageGroup] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.num_past)

    @property
    def by_document(self) -> list[PageGroup]:
        """The group itself, or those that were joined to it."""
        return self.questions or [self]

    @property
    def leaves_out(self) -> bool:
        """Whether there are past pages that are not attended."""
        num_sink = self.table.num_sink
        return any(past - num_sink > room for past, room in zip(self.num_past, self.room, strict=True))

    def own_starts(self) -> Tensor:
        """Where the own tokens begin inside each own slot, int64 [n, O]: sink pages stand at the right."""
        if self.is_query:
            return torch.zeros_like(self.lengths)
        return self.table.starts[self.num_past[0] : self.num_past[-1] + 1, None]


@dataclass
class Chunk:
    """All groups of a forward pass; `width` is the length of the longest page, without its bookmark."""

    groups: list[PageGroup]
    width: int

    @property
    def num_pages(self) -> int:
        return sum(len(group) for group in self.groups)

    def slices(self) -> list[tuple[PageGroup, slice]]:
        """Each group with its place among the chunk's pages."""
        found, start = [], 0
        for group in self.groups:
            found.append((group, slice(start, start + len(group))))
            start += len(group)
        return found

    def token_ids(self) -> Tensor:
        """Token ids of all pages behind each other, int64 [T]."""
        tokens = chain.from_iterable(page for group in self.groups for page in group.tokens)
        return torch.from_numpy(np.fromiter(tokens, np.int64))

    def page_lengths(self) -> Tensor:
        """Tokens of each page, visible bookmarks included, int64 [N]."""
        return torch.cat([group.lengths.sum(1) for group in self.groups])


def text_lengths(pages: list[list[int]], config: RetroConfig) -> Tensor:
    """Tokens in the stored page of each page of a text, int64 [P]: those of the text and, if visible, its bookmark."""
    return torch.tensor([len(page) for page in pages], dtype=torch.int64) + config.page_marks


def query_lengths(num_tokens: int, config: RetroConfig) -> list[int]:
    """Tokens in each stored page of a query of `num_tokens`; where it is visible, its bookmark is the last."""
    return page_lengths(num_tokens + config.page_marks, config.page_room)


def query_pages(tokens: list[int], config: RetroConfig) -> list[list[int]]:
    """Ids in each stored page of a query, without its bookmark."""
    ends = list(accumulate(query_lengths(len(tokens), config)))
    return [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def text_group(
    table: PageTable,
    first: int,
    tokens: list[list[int]],
    config: RetroConfig,
    window: int,
    last_probe: dict[int, Tensor] | None = None,
) -> PageGroup:
    """Group of text pages `first`, `first + 1`, … of `table`; `window` is the widest sliding window kept (tokens)."""
    ordinals = range(first, first + len(tokens))
    room = [
        room_for_past(table, n, len(page) + config.page_marks, config.kv_budget, config.strict_budget)
        for n, page in enumerate(tokens, first)
    ]
    own = slice(first, first + len(tokens))
    return PageGroup(
        table=table,
        ids=table.ids[own, None],
        lengths=table.lengths[own, None],
        num_past=list(ordinals),
        tokens=tokens,
        room=room,
        end=[_end(table, n, r, config, window) for n, r in zip(ordinals, room, strict=True)],
        last_probe={} if last_probe is None else last_probe,
    )


def query_group(
    table: PageTable, ids: Tensor, tokens: list[int], config: RetroConfig, window: int, pinned: tuple[int, ...] = ()
) -> PageGroup:
    """Group of one query page that stands behind all pages of `table`, in the store pages `ids` [O]."""
    past, lengths = len(table), torch.tensor(query_lengths(len(tokens), config))
    room = room_for_past(table, past, int(lengths.sum()), config.kv_budget, config.strict_budget)
    end = _end(table, past, room, config, window)
    return PageGroup(table, ids[None], lengths[None], [past], [tokens], [room], [end], pinned, is_query=True)


def _end(table: PageTable, num_past: int, room: int, config: RetroConfig, window: int) -> int:
    """Compact position of a page's first token: behind the largest set that any layer gathers before it."""
    past_tokens = table.tokens_in(num_past)
    if config.first_layer_mode == "full" and config.num_skip_layers:
        return past_tokens
    in_window = min(past_tokens, window + table.page_size) if window else 0
    return max(start_position(table, num_past, room), in_window)
