"""RULER's two counting tasks: the most common words of a list (cwe) and of a coded text (fwe)."""

from __future__ import annotations

import math
import random
import string
from typing import Any

from ..generator import Draft, Generator, split_template
from .wordlists import all_words, compound, fingerprint

COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
CODED_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
NUM_COMMON = 10
WORD_LENGTH = 6


class CommonWordsGenerator(Generator):
    """Ten words 30 times each among `size` - 10 words 3 times each, after a worked example (fewer under 4K)."""

    step = 10

    def __init__(self, length: int) -> None:
        self._repeats = (6, 1) if length < 4096 else (30, 3)
        self._example = (20, 3, 1) if length < 4096 else (40, 10, 3)

    def smallest(self, index: int) -> int:
        """See `Generator`: the common words and one more."""
        return NUM_COMMON + 1

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        return {"words": fingerprint()}

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        example, shown = _numbered_list(*self._example, rng)
        text, answers = _numbered_list(size, *self._repeats, rng)
        head, question = split_template(COMMON_TEMPLATE, example)
        context, _ = split_template(COMMON_TEMPLATE, text)
        opening = head + question + COMMON_PREFIX + _numbered(shown) + "\n"
        source = "wonderwords" if size <= len(all_words()) else "wonderwords and adjective-noun pairs"
        return Draft(opening + context, question, COMMON_PREFIX, answers, extra={"words": source})


def _numbered_list(num_words: int, common: int, uncommon: int, rng: random.Random) -> tuple[str, list[str]]:
    words = _draw_words(num_words, rng)
    often, rest = words[:NUM_COMMON], words[NUM_COMMON:]
    row = often * common + rest * uncommon
    rng.shuffle(row)
    return _numbered(row), often


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _draw_words(num_words: int, rng: random.Random) -> list[str]:
    """Distinct words; the lists of wonderwords first, then adjective-noun pairs, in random order."""
    listed = all_words()
    if num_words <= len(listed):
        return rng.sample(listed, num_words)
    words = dict.fromkeys(listed)
    while len(words) < num_words:
        words[compound(rng)] = None
    return rng.sample(list(words), num_words)


class CodedWordsGenerator(Generator):
    """About `size` random six-letter words, their numbers falling with the square of the rank; rank 1 is dots."""

    def __init__(self, length: int) -> None:
        self._vocabulary = max(length // 50, 4)
        self.step = max(length // 32, 1)

    def smallest(self, index: int) -> int:
        """See `Generator`: the fourth rank still occurs once."""
        return math.ceil(16 * math.pi**2 / 6)

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        return {"vocabulary": self._vocabulary}

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        words = self._words(rng)
        share = size / (math.pi**2 / 6)
        row = [word for rank, word in enumerate(words, 1) for _ in range(int(share / rank**2))]
        rng.shuffle(row)
        context, question = split_template(CODED_TEMPLATE, " ".join(row))
        return Draft(context, question, CODED_PREFIX, words[1:4])

    def _words(self, rng: random.Random) -> list[str]:
        words: dict[str, None] = {"...": None}
        while len(words) < self._vocabulary:
            words["".join(rng.choices(string.ascii_lowercase, k=WORD_LENGTH))] = None
        return list(words)
