"""Keeping evaluation texts out of the training data: equal questions and passages that share 13 words in a row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .lines import open_bytes
from .rows import content_hash

SHARED_WORDS = 13
_WORD = re.compile(r"\w+")


class EvaluationTexts:
    """Hashes of all 13-word sequences of evaluation files, and of all their short strings (questions)."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._sequences: set[int] = set()
        self._questions: set[int] = set()
        for text in texts:
            words = _WORD.findall(text.lower())
            if len(words) < 3 * SHARED_WORDS:
                self._questions.add(content_hash(text))
            self._sequences.update(_sequences(words))

    def shares_passage(self, text: str) -> bool:
        """Whether a passage has 13 words in a row with an evaluation text in common."""
        return any(key in self._sequences for key in _sequences(_WORD.findall(text.lower())))

    def has_question(self, query: str) -> bool:
        """Whether a question equals one of an evaluation file (case and white space aside)."""
        return content_hash(query) in self._questions


def _sequences(words: list[str]) -> Iterator[int]:
    for start in range(len(words) - SHARED_WORDS + 1):
        yield hash(tuple(words[start : start + SHARED_WORDS]))


def file_texts(path: Path) -> Iterator[str]:
    """Yield all strings of a JSON or JSON-lines file (plain or compressed), or the whole of another text file."""
    with open_bytes(path) as stream:
        if ".jsonl" in path.suffixes:
            for line in stream:
                yield from _strings(json.loads(line))
        elif ".json" in path.suffixes:
            yield from _strings(json.load(stream))
        else:
            yield stream.read().decode("utf-8", errors="replace")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
