"""Running text to hide needles in: essays or books, cut into words and sentences."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from ....errors import UserError
from ..files import Source, find_file, iter_rows, open_text

ESSAYS = Source(
    title="Running text for the haystack",
    places=("paulgraham", "essays", "haystack", "books"),
    how=(
        "Pass option essays=PATH: a text file, a folder of .txt files (the paper's essays lie in the repository "
        "gkamradt/LLMTest_NeedleInAHaystack), or a .jsonl of books with a field 'text'."
    ),
)
_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_OPENING = "[\"'\u201c\u2018(\\[]*"
_CLOSING = "\"'\u201d\u2019)]"
_SENTENCE_END = re.compile(rf"[.!?][{re.escape(_CLOSING)}]*$")
_SENTENCE_START = re.compile(_OPENING + "[A-Z0-9]")
_ABBREVIATION = re.compile(_OPENING + r"([A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Jr|Sr|vs|etc|e\.g|i\.e|cf|No)\.$")


class Essay:
    """A row of words, repeated as often as needed, and the sentences it falls into.

    Sentences end at a word with closing punctuation that is no abbreviation and is followed by a capital or a digit.
    RULER uses NLTK's Punkt here; where the two differ, a needle stands a few words further on.

    Attributes:
        source: name of the file or folder.
        fingerprint: hash of the words.
    """

    def __init__(self, text: str, source: str) -> None:
        self._words = text.split()
        if not self._words:
            raise UserError(f"{source} holds no text. Pass a file or folder with running text.")
        self.source = source
        self.fingerprint = hashlib.sha256(" ".join(self._words).encode()).hexdigest()[:16]
        self._ends = _sentence_ends(self._words)

    def sentences(self, num_words: int) -> list[str]:
        """Sentences of the first `num_words` words; the last one may be cut short."""
        sentences: list[str] = []
        for _ in range(num_words // len(self._words)):
            sentences += self._first(len(self._words))
        return sentences + self._first(num_words % len(self._words))

    def _first(self, num_words: int) -> list[str]:
        ends = self._ends[: bisect.bisect_left(self._ends, num_words)]
        starts = [0, *ends]
        return [" ".join(self._words[i:j]) for i, j in zip(starts, [*ends, num_words], strict=True) if i < j]


def _sentence_ends(words: list[str]) -> list[int]:
    ends = [index for index, pair in enumerate(itertools.pairwise(words), 1) if _ends_sentence(*pair)]
    return [*ends, len(words)]


def _ends_sentence(word: str, following: str) -> bool:
    if word[-1] not in ".!?" + _CLOSING or not _SENTENCE_END.search(word) or _ABBREVIATION.match(word):
        return False
    return _SENTENCE_START.match(following) is not None


def load_essay(path: Path | str | None, data_dir: Path | str | None, num_words: int) -> Essay:
    """Read the first `num_words` words of a file or folder (in order of names), or of the data folder's essays.

    Raises `UserError` where there is no text.
    """
    place = find_file(ESSAYS, data_dir) if path is None else Path(path)
    files = _text_files(place)
    if not files:
        raise UserError(f"No text in {place}: expected a file or a folder of {', '.join(_SUFFIXES)}. {ESSAYS.how}")
    words: list[str] = []
    for text in _texts(files):
        words += text.split()
        if len(words) >= num_words:
            break
    return Essay(" ".join(words[:num_words]), place.name)


def _text_files(place: Path) -> list[Path]:
    files = sorted(place.iterdir()) if place.is_dir() else [place] if place.exists() else []
    return [file for file in files if file.name.endswith(_SUFFIXES) and file.name.lower() != "readme.txt"]


def _texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        if ".jsonl" in file.suffixes:
            yield from (row["text"] for row in iter_rows(file))
        else:
            with open_text(file) as stream:
                yield stream.read()
