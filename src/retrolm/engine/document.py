"""A document that was read: its pages, and questions to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..paging import PageTable
from .page_words import PageWords, page_words
from .results import Answer, PageUse, Retrieval

if TYPE_CHECKING:
    from .encoder import Encoder
    from .model import RetroLM


@dataclass
class Document:
    """Pages of one text, kept in a page store. Asking changes nothing in it.

    Attributes:
        text: the text, or None if it was given as token ids.
        table: its pages, prefix page first where there is one.
        page_spans: character span of each page; (0, 0) for prefix pages and where no text is known.
        token_ids: ids of each page. prefill_s: seconds it took to read.
    """

    lm: RetroLM
    encoder: Encoder
    text: str | None
    table: PageTable
    page_spans: list[tuple[int, int]]
    token_ids: list[list[int]]
    prefill_s: float
    peak_attended: int
    is_cached: ClassVar[bool] = True
    _closed: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of all pages, prefix included, bookmarks not."""
        return self.table.num_tokens - self.num_pages * self.lm.config.page_marks

    @property
    def num_pages(self) -> int:
        return len(self.table)

    @cached_property
    def words(self) -> PageWords | None:
        """Its words, for questions with `word_weight`; None without a tokenizer."""
        return None if self.lm.tokenizer is None else page_words(self.lm)

    def ask(self, question: str | Sequence[str], *, max_new_tokens: int = 64, raw: bool = False, **options: Any) -> Any:
        """Answer a question, or several at once.

        Args:
            question: one question → `Answer`; a sequence → list of answers, the same as one at a time.
            max_new_tokens: tokens to generate at most.
            raw: take the question as the exact prompt text behind the document, without the question template.
            options: passed to transformers' `generate` (do_sample, num_beams, stopping_criteria, streamer, …).

        Raises:
            UserError: the question leaves no room for the text in the budget.
        """
        single = isinstance(question, str)
        questions = [question] if isinstance(question, str) else list(question)
        answers = self.lm.ask_batch([(self, q) for q in questions], max_new_tokens=max_new_tokens, raw=raw, **options)
        return answers[0] if single else answers

    def stream(self, question: str, *, max_new_tokens: int = 256, raw: bool = False, **options: Any) -> Iterator[str]:
        """Yield the answer piece by piece as it is generated."""
        return self.lm.stream(self, question, max_new_tokens=max_new_tokens, raw=raw, **options)

    def retrieve(self, question: str, *, raw: bool = False) -> Retrieval:
        """Which pages the question attends, without generating."""
        return self.lm.retrieve(self, question, raw=raw)

    def conversation(self) -> Conversation:
        """Begin a conversation on this document; its turns become pages too."""
        return Conversation(self)

    def page_text(self, page: int) -> str:
        """Text of a page; decoded from its tokens where the text itself isn't known."""
        start, end = self.page_spans[page]
        if self.text is not None and end > start:
            return self.text[start:end]
        decoded: str = self.lm.tokenizer.decode(self.token_ids[page]) if self.lm.tokenizer is not None else ""
        return decoded

    def page_use(self, page: int, score: float, layers: tuple[int, ...]) -> PageUse:
        start, end = self.page_spans[page]
        return PageUse(page, start, end, score, layers, self.page_text(page))

    def close(self) -> None:
        """Give the document's pages back to the store; it can't be asked any more."""
        if not self._closed:
            self.encoder.parts.store.release(self.table.ids)
        self._closed = True

    def require_open(self) -> None:
        """Raise `UserError` if the document was closed."""
        if self._closed:
            raise UserError("This document was closed and its pages given back. Read the text again.")


@dataclass(frozen=True)
class Past:
    """What stands before the next question: the document's pages, then those of the turns.

    Attributes:
        token_ids: ids of each page. turn_ids: store pages of the turns, int64.
    """

    table: PageTable
    token_ids: list[list[int]]
    turn_ids: Tensor


class Conversation:
    """Questions that build on each other. Past turns are pages behind the document's."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._past = self._beginning()

    def ask(self, question: str, *, max_new_tokens: int = 256, raw: bool = False, **options: Any) -> Answer:
        """Answer the next question; the turn is kept for later ones."""
        self.document.require_open()
        answer, self._past = self.document.lm.turn(
            self.document, self._past, question, max_new_tokens=max_new_tokens, raw=raw, **options
        )
        return answer

    def close(self) -> None:
        """Give the turns' pages back; the next question begins anew."""
        self.document.encoder.parts.store.release(self._past.turn_ids)
        self._past = self._beginning()

    def _beginning(self) -> Past:
        return Past(self.document.table, self.document.token_ids, torch.empty(0, dtype=torch.int64))
