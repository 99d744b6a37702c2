"""What asking a base gives: an answer or passages, and where in which file they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..engine.results import Answer, PageUse
    from .restore import KeptDocument

Reuse = Literal["exact", "composed"]


@dataclass(frozen=True)
class Passage:
    """A page that was retrieved.

    Attributes:
        document, source, metadata: the document it is part of. page: its number there.
        start_char, end_char: its place in the document's text. text: what stands there.
        score: share of the scoring layers whose best pages include it, 0 to 1. layers: those layers.
    """

    document: str
    source: str
    metadata: dict[str, Any]
    page: int
    start_char: int
    end_char: int
    text: str
    score: float
    layers: tuple[int, ...]

    def describe(self) -> dict[str, Any]:
        """All but the text, JSON types only; the document's own fields first."""
        return {
            **self.metadata,
            "document": self.document,
            "source": self.source,
            "page": self.page,
            "start_char": self.start_char,
            "end_char": self.end_char,
            "score": self.score,
            "layers": list(self.layers),
        }


@dataclass(frozen=True)
class KnowledgeAnswer:
    """An answer from a base.

    Attributes:
        reuse: "exact" = one document, the same numbers as when it had just been read; "composed" = several, each
            read without seeing the others.
        documents: names of the documents that were asked. num_tokens, num_pages: of all of them.
        page_bytes_read: bytes of pages read from disk for it.
    """

    answer: Answer
    reuse: Reuse
    documents: tuple[str, ...]
    passages: tuple[Passage, ...]
    num_tokens: int
    num_pages: int
    page_bytes_read: int

    @property
    def text(self) -> str:
        return self.answer.text


def passages(document: KeptDocument, pages: Sequence[PageUse]) -> tuple[Passage, ...]:
    """Pages of a restored document as passages of the documents it consists of."""
    return tuple(_passage(document, page) for page in pages)


def _passage(document: KeptDocument, use: PageUse) -> Passage:
    stored, page = document.locate(use.page)
    entry = stored.entry
    start, end = stored.span(page)
    return Passage(
        entry.name, entry.source, entry.metadata, page, start, end, stored.page_text(page), use.score, use.layers
    )
