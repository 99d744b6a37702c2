"""Whole sequences cut into pages side by side: what the dense passes of training and analysis work on.

Shape letters: B sequences, T tokens, M pages with the query page last, P text pages (M = P + 1), W page size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = Sequence[int] | NDArray[np.integer[Any]]


@dataclass
class PageBatch:
    """Padded sequences [prefix | text | question(s)] and where their pages stand.

    Attributes:
        tokens_BT: token ids, padded at the right.
        num_prefix: tokens of the prefix (the sink), the same in every sequence.
        starts_BM, lengths_BM: first token and tokens of each page, int64; query pages are the last columns. Pages that
            a sequence doesn't have are of length 0.
        num_questions: query pages. Each follows the text directly, as if the others were not there.
    """

    tokens_BT: Tensor
    num_prefix: int
    starts_BM: Tensor
    lengths_BM: Tensor
    num_questions: int = 1

    @property
    def text_lengths(self) -> Tensor:
        """Tokens of the text pages."""
        return self.lengths_BM[:, : -self.num_questions]

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.num_prefix * len(self.lengths_BM) + int(self.lengths_BM.sum())

    def to(self, device: torch.device) -> PageBatch:
        return PageBatch(
            self.tokens_BT.to(device, non_blocking=True),
            self.num_prefix,
            self.starts_BM.to(device, non_blocking=True),
            self.lengths_BM.to(device, non_blocking=True),
            self.num_questions,
        )


def page_batch(
    prefix: Sequence[int],
    texts: Sequence[Ids],
    questions: Sequence[Ids],
    page_size: int,
    pad_id: int,
    further: Sequence[Sequence[Ids]] = (),
) -> PageBatch:
    """Lay sequences out. Every text and question has at least one token; `further` holds more questions per text."""
    num_pages = [-(-len(text) // page_size) for text in texts]
    asked = [[question, *more] for question, more in zip(questions, further or [()] * len(texts), strict=True)]
    rows = [
        torch.cat([torch.as_tensor(part, dtype=torch.int64) for part in (prefix, text, *queries)])
        for text, queries in zip(texts, asked, strict=True)
    ]
    num_questions = max(map(len, asked))
    tokens = torch.full((len(texts), max(map(len, rows))), pad_id)
    starts = torch.zeros(len(texts), max(num_pages) + num_questions, dtype=torch.int64)
    lengths = torch.zeros_like(starts)
    for row, (text, queries, pages) in enumerate(zip(texts, asked, num_pages, strict=True)):
        tokens[row, : len(rows[row])] = rows[row]
        first = torch.arange(pages) * page_size
        starts[row, :pages] = len(prefix) + first
        lengths[row, :pages] = (len(text) - first).clamp(max=page_size)
        sizes = torch.tensor([len(query) for query in queries])
        columns = slice(max(num_pages), max(num_pages) + len(queries))
        starts[row, columns] = len(prefix) + len(text) + sizes.cumsum(0) - sizes
        lengths[row, columns] = sizes
    return PageBatch(tokens, len(prefix), starts, lengths, num_questions)
