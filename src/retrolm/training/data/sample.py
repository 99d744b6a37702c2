"""One training example of the page retriever, and which of its pages hold the evidence (D15)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...metrics.gold_pages import evidence_pages

IntArray = NDArray[np.int64]
TokenArray = NDArray[np.int32]
Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class FurtherQuestion:
    """Another question on the text of a sample, read in place of the sample's own; fields as there."""

    question_ids: TokenArray
    positive_spans: tuple[Span, ...]
    masked_spans: tuple[Span, ...] = ()


@dataclass(frozen=True, eq=False)
class Stage1Sample:
    """A text with evidence at known places and a question for it, as token ids.

    The model reads prefix page, text pages, question page: `prefix_ids + input_ids + question_ids` is the whole
    prompt (one user turn of the chat template, D24).

    Attributes:
        input_ids: int32 [T], the text; pages are cut from its first token on.
        question_ids: int32 [Q], everything behind the text: question and the chat template's tail.
        prefix_ids: int32 [S], BOS and the chat template's head up to where the user's text begins.
        positive_spans: token spans (start, end) within `input_ids` that hold the evidence.
        source: the name of the mixture part that made the sample.
        masked_spans: spans that are neither evidence nor fair negatives (they leave the denominator).
        further: more questions on the same text, each of which sees the text but none of the others.
    """

    input_ids: TokenArray
    question_ids: TokenArray
    prefix_ids: TokenArray
    positive_spans: tuple[Span, ...]
    source: str
    masked_spans: tuple[Span, ...] = ()
    further: tuple[FurtherQuestion, ...] = ()

    @property
    def questions(self) -> tuple[Stage1Sample | FurtherQuestion, ...]:
        """All questions on the text, its own first."""
        return (self, *self.further)


def page_labels(sample: Stage1Sample | FurtherQuestion, page_size: int) -> tuple[IntArray, IntArray]:
    """Return (positives, masked): ascending indices of text pages, page 0 being the first page of `input_ids`.

    Positive are the pages that hold evidence (`evidence_pages`). Masked are pages that touch a positive span less
    than that, or touch a masked span. The two sets are disjoint. Spec D15 (b). Raises `UserError` if
    `page_size` < 1.
    """
    if page_size < 1:
        raise UserError(f"page_size must be at least 1, got {page_size}.")
    positives, touched = evidence_pages(sample.positive_spans, page_size)
    touched |= evidence_pages(sample.masked_spans, page_size)[1]
    return _ascending(positives), _ascending(touched - positives)


def _ascending(pages: set[int]) -> IntArray:
    return np.array(sorted(pages), dtype=np.int64)
