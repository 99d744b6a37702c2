"""Which of several texts share a question's words: BM25 over lower-case words.

Lucene's form with k1 = 1.5 and b = 0.75, as `rag_bm25` has it from bm25s. That library indexes every word beforehand;
here few questions are put to a text, whose index has to be small and quickly there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

WORD = re.compile(r"\w+")
_K1, _B = 1.5, 0.75


class WordIndex:
    """The words of texts as numbers, four bytes each.

    Args:
        texts: what is scored, taken one after the other.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._numbers: dict[str, int] = {}
        rows = [self._numbered(text) for text in texts]
        self._lengths = np.array([len(row) for row in rows], np.int64)
        self._words = np.concatenate([np.empty(0, np.int32), *rows])

    def scores(self, question: str) -> NDArray[np.float64]:
        """Score of each text, [P]; 0 where it shares no word. A word counts as often as the question has it."""
        num_texts = len(self._lengths)
        total = np.zeros(num_texts)
        text_of = np.repeat(np.arange(num_texts), self._lengths)
        mean = self._lengths.sum() / max(num_texts, 1) or 1.0
        damped = _K1 * (1 - _B + _B * self._lengths / mean)
        for word in words(question):
            number = self._numbers.get(word)
            if number is not None:
                often = np.bincount(text_of[self._words == number], minlength=num_texts)
                holding = np.count_nonzero(often)
                total += np.log1p((num_texts - holding + 0.5) / (holding + 0.5)) * often / (often + damped)
        return total

    def _numbered(self, text: str) -> NDArray[np.int32]:
        numbers = self._numbers
        return np.array([numbers.setdefault(word, len(numbers)) for word in words(text)], np.int32)


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text."""
    return WORD.findall(text.lower())
