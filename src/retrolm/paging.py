"""Pages: how a row of tokens is cut, and where each page's tokens stand.

Shape letters: P pages of a document, N pages of a chunk, S slots (places of pages in a gathered set), W page size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def page_lengths(num_tokens: int, page_size: int) -> list[int]:
    """Cut `num_tokens` into full pages and, if any are left over, one short page (paper eq 2)."""
    full, rest = divmod(num_tokens, page_size)
    return [page_size] * full + ([rest] if rest else [])


@dataclass
class PageTable:
    """The pages of one document, in reading order.

    Attributes:
        ids: page numbers in the page store, int64 [P].
        lengths: tokens in each page, int64 [P], its bookmark among them where that is visible; a sink page and the last
            page of a text can be short.
        num_sink: leading pages that are always attended (attention sink).
        page_size: room for tokens in one stored page (W). Sink pages stand at the right end of their room, all
            others at the left end: then the gathered row of a full set has no holes.
    """

    ids: Tensor
    lengths: Tensor
    num_sink: int
    page_size: int

    def __post_init__(self) -> None:
        total = self.lengths.cumsum(0)
        self.tokens_before = total - self.lengths
        self._before = [0, *total.tolist()]  # asking a tensor for one number costs as much as a launch
        self.num_tokens = self._before[-1]
        self.sink_tokens = int(self.lengths[: self.num_sink].sum())
        starts = torch.zeros_like(self.lengths)
        starts[: self.num_sink] = self.page_size - self.lengths[: self.num_sink]
        self.starts = starts

    def __len__(self) -> int:
        return len(self.ids)

    def tokens_in(self, num_pages: int) -> int:
        """Tokens of the first `num_pages` pages."""
        return self._before[num_pages]

    def extended(self, ids: Tensor, lengths: Tensor) -> PageTable:
        """Return a table with further pages behind these."""
        return PageTable(torch.cat([self.ids, ids]), torch.cat([self.lengths, lengths]), self.num_sink, self.page_size)

    def to(self, device: torch.device) -> PageTable:
        """Return the table with its tensors on `device`."""
        return PageTable(self.ids.to(device), self.lengths.to(device), self.num_sink, self.page_size)


def room_for_past(table: PageTable, num_past: int, own_tokens: int, kv_budget: int, strict: bool) -> int:
    """How many pages, sinks aside, page `num_past` may attend before itself (D8).

    If all past tokens and the page itself fit the budget it may attend all of them; otherwise every page counts as a
    full one. `own_tokens` is what the current page takes from the budget when `strict`.
    """
    past_tokens = table.tokens_in(num_past)
    own = own_tokens if strict else 0
    if past_tokens + own <= kv_budget:
        return max(num_past - table.num_sink, 0)
    return (kv_budget - table.sink_tokens - own) // table.page_size


def start_position(table: PageTable, num_past: int, room: int) -> int:
    """Compact position of the first token of page `num_past`: all past tokens if they fit, else a full set (D6)."""
    past_tokens = table.tokens_in(num_past)
    return min(past_tokens, table.sink_tokens + room * table.page_size)


@dataclass
class Slots:
    """Where the tokens of a gathered set stand.

    Attributes:
        positions: compact position of each gathered token, int64 [N, S*W]; 0 where not valid.
        valid: whether a token exists there, bool [N, S*W].
    """

    positions: Tensor
    valid: Tensor


def place(lengths_NS: Tensor, starts_NS: Tensor, end_N: Tensor, page_size: int) -> Slots:
    """Give the tokens of gathered pages compact positions so that each set ends right before `end_N` (D6).

    Args:
        lengths_NS: tokens per slot, int64 [N, S]; 0 for an empty slot.
        starts_NS: first token's place inside its slot, int64 [N, S].
        end_N: position that follows the set's last token, int64 [N].
    """
    before_NS = lengths_NS.cumsum(1) - lengths_NS
    base_N = end_N - lengths_NS.sum(1)
    inside_W = torch.arange(page_size, device=lengths_NS.device)
    offset_NSW = inside_W - starts_NS[..., None]
    valid_NSW = (offset_NSW >= 0) & (offset_NSW < lengths_NS[..., None])
    positions_NSW = base_N[:, None, None] + before_NS[..., None] + offset_NSW
    positions_NSW = positions_NSW.masked_fill(~valid_NSW, 0)
    return Slots(positions_NSW.flatten(1), valid_NSW.flatten(1))
