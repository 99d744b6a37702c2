"""How one text is cut into pages for a pass over the whole of it. Shape letters: T tokens, M pages, W page size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..paging import PageTable


@dataclass(frozen=True)
class SparsePages:
    """How one text is cut: [sink prefix, if any | full pages | last page, maybe short].

    Attributes:
        num_tokens: T. lengths: tokens of each page [M]. page_size: W. pad_left: empty places of the first page.
    """

    num_tokens: int
    lengths: tuple[int, ...]
    page_size: int
    pad_left: int

    @classmethod
    def cut(cls, num_tokens: int, num_prefix: int, page_size: int) -> SparsePages:
        """Cut a text whose first `num_prefix` tokens are a page of their own; raises `UserError` if they are more."""
        if num_prefix > page_size:
            raise UserError(
                f"The prefix takes {num_prefix} tokens, more than one page of {page_size}. Use a larger page_size, or "
                "train without the prefix."
            )
        full, rest = divmod(num_tokens - num_prefix, page_size)
        lengths = [num_prefix] * (num_prefix > 0) + [page_size] * full + [rest] * (rest > 0)
        return cls(num_tokens, tuple(lengths), page_size, page_size - num_prefix if num_prefix else 0)

    @property
    def table(self) -> PageTable:
        return PageTable(torch.arange(len(self.lengths)), torch.tensor(self.lengths), 1, self.page_size)

    def paged(self, x_THD: Tensor) -> Tensor:
        """Tokens as stored pages [M, W, heads, D]: the sink at the right of its room, zeros where no token is."""
        behind = self._behind
        if self.pad_left or behind:
            x_THD = F.pad(x_THD, (0, 0, 0, 0, self.pad_left, behind))
        return x_THD.unflatten(0, (-1, self.page_size))

    def left_aligned(self, pages_MWHD: Tensor) -> Tensor:
        """The same pages with every page's tokens at the left."""
        if not self.pad_left:
            return pages_MWHD
        first, empty = pages_MWHD[:1, self.pad_left :], pages_MWHD[:1, : self.pad_left]
        rows = [x.flatten(0, 1) for x in (first, empty, pages_MWHD[1:])]
        return torch.cat(rows).view_as(pages_MWHD)

    @property
    def _behind(self) -> int:
        """Empty places of the last page."""
        return len(self.lengths) * self.page_size - self.pad_left - self.num_tokens
