"""Where tokens and bookmarks of a batch stand, and who sees whom, if bookmarks are visible to tokens (D1 a, D2 a).

The rows of a sequence are its tokens [prefix | text | question(s)] and, behind all of them, one bookmark per page. The
prefix is cut into pages with bookmarks, too, as in reading documents. A bookmark takes the position behind its page,
and is seen by all that follows there; one of a question, by nobody.
Shape letters: B sequences, T tokens, N pages (prefix pages, text pages, questions; a multiple of some number, so that
masks are aligned), R = T + N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..paging import page_lengths
from .page_batch import PageBatch
from .question_attention import SeparateQuestions

_ALIGNED = 16  # columns of a mask, or every layer copies it


class VisiblePages:
    """The layout of one batch.

    Args:
        page_size: tokens per page of the prefix.

    Attributes:
        num_prefix: pages of the prefix. num_pages: N.
        starts_BN, lengths_BN: first token and tokens of each page, int64; length 0 where a sequence has none.
        positions_BR: of tokens and bookmarks. is_sink_N: which pages are sinks, bool.
        sink_rows_BS: rows of the sink pages, bookmarks included, as they stand.
    """

    def __init__(self, batch: PageBatch, page_size: int) -> None:
        device = batch.tokens_BT.device
        self._num_tokens = batch.tokens_BT.shape[1]
        prefix = torch.tensor(page_lengths(batch.num_prefix, page_size), dtype=torch.int64, device=device)
        self.num_prefix = len(prefix)
        before = (prefix.cumsum(0) - prefix).expand(len(batch.starts_BM), -1), prefix.expand(len(batch.starts_BM), -1)
        starts_BN, lengths_BN = torch.cat([before[0], batch.starts_BM], 1), torch.cat([before[1], batch.lengths_BM], 1)
        num_marks = starts_BN.shape[1]
        unused = -(self._num_tokens + num_marks) % _ALIGNED
        self.starts_BN, self.lengths_BN = pad(starts_BN, (0, unused)), pad(lengths_BN, (0, unused))
        self.num_pages = num_marks + unused
        first_question = num_marks - batch.num_questions
        places = torch.arange(self.num_pages, device=device)
        seen_BN = (self.lengths_BN > 0) & (places < first_question)
        ends_BN = self.starts_BN + self.lengths_BN
        never = self._num_tokens + 1
        self._seen_from_BN = ends_BN.where(seen_BN, never)
        self._questions = SeparateQuestions(batch)
        self.positions_BR = self._positions(ends_BN, seen_BN)
        self.is_sink_N = places < max(self.num_prefix, 1)
        self.sink_rows_BS = self._sink_rows(batch)

    @property
    def num_rows(self) -> int:
        return self._num_tokens + self.num_pages

    def allowed(self, window: int | None) -> Tensor:
        """Which rows each token may attend, bool [B, T, R]."""
        columns = torch.arange(self._num_tokens, device=self.positions_BR.device)
        own_BT1, end_B11 = self._questions.own_starts_BT[..., None], self._questions.ends_B1[..., None]
        tokens_BTT = (columns <= columns[:, None]) & ((columns < end_B11) | (columns >= own_BT1))
        marks_BTN = self._seen_from_BN[:, None] <= columns[:, None]
        allowed = torch.cat([tokens_BTT, marks_BTN], 2)
        if window is not None:
            distance = self.positions_BR[:, : self._num_tokens, None] - self.positions_BR[:, None]
            allowed &= distance < window
        return allowed

    def own_rows(self) -> Tensor:
        """The tokens of each page, int64 [B, N, W], W of the longest; beyond a page's end, any row."""
        inside = torch.arange(int(self.lengths_BN.max()), device=self.starts_BN.device)
        return (self.starts_BN[..., None] + inside).clamp(max=self._num_tokens - 1)

    def _positions(self, ends_BN: Tensor, seen_BN: Tensor) -> Tensor:
        """Of tokens: how many tokens and visible bookmarks stand before; of bookmarks: behind their page's end."""
        columns = torch.arange(self._num_tokens, device=ends_BN.device)
        before_BT = (self._seen_from_BN[:, None] <= columns[:, None]).sum(2)
        tokens_BT = self._questions.positions_BT + before_BT
        marks_BN = ends_BN + seen_BN.cumsum(1) - seen_BN.long()
        return torch.cat([tokens_BT, marks_BN], 1)

    def _sink_rows(self, batch: PageBatch) -> Tensor:
        """Rows of the prefix pages or, without a prefix, of the first page: tokens, bookmark, page by page."""
        if not self.num_prefix and batch.sizes.first is None:
            raise ValueError("first pages of unequal length can't be the sinks of one batch; give a prefix")
        rows = []
        for page in range(max(self.num_prefix, 1)):
            start, length = int(self.starts_BN[0, page]), int(self.lengths_BN[0, page])
            rows += [*range(start, start + length), self._num_tokens + page]
        return torch.tensor(rows, device=self.starts_BN.device).expand(len(self.starts_BN), -1)


def rows_of(x_BRKD: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, R, K, D] at int64 [B, ...] of each sequence: [B, ..., K, D]."""
    flat = rows.flatten(1)
    found = x_BRKD[torch.arange(len(flat), device=flat.device)[:, None], flat]
    return found.unflatten(1, rows.shape[1:])
