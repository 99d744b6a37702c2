"""Whole sequences cut into pages side by side: what the dense passes of training and analysis work on.

Shape letters: B sequences, T tokens, M pages with the query page last, P text pages (M = P + 1), W page size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PageSizes:
    """Lengths that decide the shapes of a pass, as plain numbers: read from a device, each would wait for its work.

    Attributes:
        num_tokens: tokens that are no padding. widest: tokens of the longest page, query pages included.
        first: tokens of the first pages, text_end: where the questions begin; None where sequences differ.
        longest_question, question_rows: tokens of the longest question, and of one sequence's questions at most.
    """

    num_tokens: int
    widest: int
    first: int | None
    text_end: int | None
    longest_question: int
    question_rows: int


@dataclass
class PageBatch:
    """Padded sequences [prefix | text | question(s)] and where their pages stand.

    Attributes:
        tokens_BT: token ids, padded at the right.
        num_prefix: tokens of the prefix (the sink), the same in every sequence.
        starts_BM, lengths_BM: first token and tokens of each page, int64; query pages are the last columns. Pages that
            a sequence doesn't have are of length 0.
        num_questions: query pages. Each follows the text directly, as if the others were not there.
        sizes: taken from `lengths_BM` where it isn't given.
    """

    tokens_BT: Tensor
    num_prefix: int
    starts_BM: Tensor
    lengths_BM: Tensor
    num_questions: int = 1
    sizes: PageSizes = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.sizes is None:
            self.sizes = _sizes(self)

    @property
    def text_lengths(self) -> Tensor:
        """Tokens of the text pages."""
        return self.lengths_BM[:, : -self.num_questions]

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.sizes.num_tokens

    def to(self, device: torch.device) -> PageBatch:
        return self._with(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> PageBatch:
        """The batch in page-locked memory, from which a copy to a GPU waits for nothing (a DataLoader calls this)."""
        return self._with(lambda part: part.pin_memory())

    def _with(self, move: Callable[[Tensor], Tensor]) -> PageBatch:
        tokens, starts, lengths = (move(part) for part in (self.tokens_BT, self.starts_BM, self.lengths_BM))
        return PageBatch(tokens, self.num_prefix, starts, lengths, self.num_questions, self.sizes)


def _sizes(batch: PageBatch) -> PageSizes:
    starts_BM, lengths_BM = batch.starts_BM.cpu(), batch.lengths_BM.cpu()
    questions_BQ = lengths_BM[:, -batch.num_questions :]
    return PageSizes(
        num_tokens=batch.num_prefix * len(lengths_BM) + int(lengths_BM.sum()),
        widest=int(lengths_BM.max()),
        first=_common(lengths_BM[:, 0]),
        text_end=_common(starts_BM[:, -batch.num_questions]),
        longest_question=int(questions_BQ.max()),
        question_rows=int(questions_BQ.sum(1).max()),
    )


def _common(values_B: Tensor) -> int | None:
    values = set(values_B.tolist())
    return values.pop() if len(values) == 1 else None


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
