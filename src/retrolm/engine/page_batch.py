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
    """Padded sequences [prefix | text | question] and where their pages stand.

    Attributes:
        tokens_BT: token ids, padded at the right.
        num_prefix: tokens of the prefix (the sink), the same in every sequence.
        starts_BM, lengths_BM: first token and tokens of each page, int64; the query page is the last column, text
            pages that a shorter sequence doesn't have are of length 0.
    """

    tokens_BT: Tensor
    num_prefix: int
    starts_BM: Tensor
    lengths_BM: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        ends = self.starts_BM[:, -1] + self.lengths_BM[:, -1]
        return int(ends.sum())

    def to(self, device: torch.device) -> PageBatch:
        return PageBatch(
            self.tokens_BT.to(device, non_blocking=True),
            self.num_prefix,
            self.starts_BM.to(device, non_blocking=True),
            self.lengths_BM.to(device, non_blocking=True),
        )


def page_batch(
    prefix: Sequence[int], texts: Sequence[Ids], questions: Sequence[Ids], page_size: int, pad_id: int
) -> PageBatch:
    """Lay sequences out. Every text and question has at least one token."""
    num_pages = [-(-len(text) // page_size) for text in texts]
    width = max(len(prefix) + len(t) + len(q) for t, q in zip(texts, questions, strict=True))
    tokens = torch.full((len(texts), width), pad_id)
    starts = torch.zeros(len(texts), max(num_pages) + 1, dtype=torch.int64)
    lengths = torch.zeros_like(starts)
    for row, (text, question, pages) in enumerate(zip(texts, questions, num_pages, strict=True)):
        ids = torch.cat([torch.as_tensor(part, dtype=torch.int64) for part in (prefix, text, question)])
        tokens[row, : len(ids)] = ids
        first = torch.arange(pages) * page_size
        starts[row, :pages] = len(prefix) + first
        lengths[row, :pages] = (len(text) - first).clamp(max=page_size)
        starts[row, -1] = len(prefix) + len(text)
        lengths[row, -1] = len(question)
    return PageBatch(tokens, len(prefix), starts, lengths)
