"""A text for methods that take a prompt as a whole: kept as token ids, read anew with each question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UserError

if TYPE_CHECKING:
    from .model import RetroLM


@dataclass
class PromptDocument:
    """A text that is put before each question; the methods that need this keep nothing between questions.

    Attributes:
        text: the text, or None if it was given as token ids. token_ids: its ids, without the prefix.
    """

    lm: RetroLM
    text: str | None
    token_ids: list[int]
    prefill_s: float = 0.0
    num_pages: int = 0
    is_cached: ClassVar[bool] = False
    _closed: bool = False

    @property
    def prefix(self) -> tuple[int, ...]:
        """BOS and the chat template's head."""
        return self.lm.format.prefix_ids if self.lm.format else ()

    @property
    def num_tokens(self) -> int:
        """Tokens of text and prefix."""
        return len(self.prefix) + len(self.token_ids)

    def ask(self, question: str | Sequence[str], *, max_new_tokens: int = 64, raw: bool = False, **options: Any) -> Any:
        """As `Document.ask`; the text is read again for each question."""
        questions = [question] if isinstance(question, str) else list(question)
        answers = self.lm.ask_batch([(self, q) for q in questions], max_new_tokens=max_new_tokens, raw=raw, **options)
        return answers[0] if isinstance(question, str) else answers

    def stream(self, question: str, *, max_new_tokens: int = 256, raw: bool = False, **options: Any) -> Iterator[str]:
        """Yield the answer piece by piece as it is generated."""
        return self.lm.stream(self, question, max_new_tokens=max_new_tokens, raw=raw, **options)

    def retrieve(self, question: str, *, raw: bool = False) -> Any:
        """There are no pages; raises `UserError`."""
        raise self._no_pages("retrieve")

    def conversation(self) -> Any:
        """Turns are kept as pages; raises `UserError`."""
        raise self._no_pages("conversation")

    def close(self) -> None:
        """The document can't be asked any more."""
        self._closed = True

    def require_open(self) -> None:
        """Raise `UserError` if the document was closed."""
        if self._closed:
            raise UserError("This document was closed. Read the text again.")

    def _no_pages(self, call: str) -> UserError:
        name = self.lm.method.name
        return UserError(f"{call}() works on pages, which method {name!r} doesn't have. Use a method of kind 'pages'.")
