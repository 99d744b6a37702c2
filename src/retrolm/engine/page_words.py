"""The words of a document's pages, for questions that look for pages by words as well as by bookmarks.

A page's bookmark knows what the page is about; that it holds one name, number or key among many alike is told by its
letters. They are at hand: every page's token ids stay in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..asked_words import query_of
from ..cut_sentences import with_cut_sentences
from ..word_index import WordIndex
from .prompts import PromptFormat

if TYPE_CHECKING:
    from .model import RetroLM

Pages = Sequence[Sequence[int]]


class PageWords:
    """Decodes and indexes pages when the first question comes, and again when there are other pages (turns).

    Args:
        tokenizer: of the model. form: the chat template, whose tail is no part of what is asked; None = there is none.
        whole_sentences: a sentence that a page border cuts counts for both pages.
        page_size: tokens of a full page. A shorter one ends a text: what follows is another document of a knowledge
            base, or a turn of a conversation, and no sentence runs over that border. 0 = all pages are of one text.
    """

    def __init__(
        self, tokenizer: Any, form: PromptFormat | None = None, whole_sentences: bool = True, page_size: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._whole_sentences, self._page_size = whole_sentences, page_size
        self._tail = "" if form is None else self._text(form.encode(form.tail)).strip()
        self._indexed: tuple[Pages, WordIndex] | None = None

    def matches(self, pages: Pages, question: Sequence[int]) -> Tensor:
        """BM25 score of each page for the question's words, float32 [P], instructions left out (`query_of`).

        Args:
            pages: token ids of each page. question: token ids of the question page.
        """
        if self._indexed is None or self._indexed[0] is not pages:
            self._indexed = pages, WordIndex(self._counted(pages))
        asked = self._text(question).strip().removesuffix(self._tail)
        return torch.from_numpy(self._indexed[1].scores(query_of(asked))).float()

    def _counted(self, pages: Pages) -> list[str]:
        """What counts for each page."""
        texts = list(self._texts(pages))
        if not self._whole_sentences:
            return texts
        ends = [n for n, page in enumerate(pages, 1) if len(page) < self._page_size]
        borders = pairwise([0, *ends, len(texts)])
        return [text for start, end in borders for text in with_cut_sentences(texts[start:end])]

    def _texts(self, pages: Pages) -> Iterator[str]:
        """What each page says. A token before it keeps the space that some tokenizers drop where a text begins."""
        before: list[int] = []
        for page in pages:
            yield self._text([*before, *page])[len(self._text(before)) :]
            before = list(page[-1:]) or before

    def _text(self, ids: Sequence[int]) -> str:
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded


def page_words(lm: RetroLM) -> PageWords:
    """The words of a text that `lm` read; it needs a tokenizer."""
    return PageWords(lm.tokenizer, lm.format, lm.config.whole_sentences, lm.config.page_size)
