"""The words of a document's pages, for questions that look for pages by words as well as by bookmarks.

A page's bookmark knows what the page is about; that it holds one name, number or key among many alike is told by its
letters. They are at hand: every page's token ids stay in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..asked_words import query_of
from ..word_index import WordIndex
from .prompts import PromptFormat

Pages = Sequence[Sequence[int]]


class PageWords:
    """Decodes and indexes pages when the first question comes, and again when there are other pages (turns).

    Args:
        tokenizer: of the model. form: the chat template, whose tail is no part of what is asked; None = there is none.
    """

    def __init__(self, tokenizer: Any, form: PromptFormat | None = None) -> None:
        self._tokenizer = tokenizer
        self._tail = "" if form is None else self._text(form.encode(form.tail)).strip()
        self._indexed: tuple[Pages, WordIndex] | None = None

    def matches(self, pages: Pages, question: Sequence[int]) -> Tensor:
        """BM25 score of each page for the question's words, float32 [P], instructions left out (`query_of`).

        Args:
            pages: token ids of each page. question: token ids of the question page.
        """
        if self._indexed is None or self._indexed[0] is not pages:
            self._indexed = pages, WordIndex(map(self._text, pages))
        asked = self._text(question).strip().removesuffix(self._tail)
        return torch.from_numpy(self._indexed[1].scores(query_of(asked))).float()

    def _text(self, ids: Sequence[int]) -> str:
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded
