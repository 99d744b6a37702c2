"""The example book and the questions that were written down beforehand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
CONTENT: dict[str, Any] = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
BOOK = (EXAMPLES / CONTENT["book"]).read_text(encoding="utf-8")
OPENING = BOOK[: CONTENT["opening_chars"]]
CHARS_PER_TOKEN = 4.7  # of the demo model on this book


@pytest.mark.parametrize("entry", CONTENT["questions"] + CONTENT["book_questions"], ids=lambda e: e["question"][:30])
def test_the_evidence_stands_where_it_should(entry: dict[str, Any]) -> None:
    start, evidence = entry["char_offset"], entry["evidence"]
    assert BOOK[start : start + len(evidence)] == evidence
    assert BOOK.count(evidence) == 1
    assert entry["expected"] in evidence
    assert entry["expected"] not in entry["question"]


def test_the_openings_answers_lie_deep_and_apart() -> None:
    offsets = sorted(entry["char_offset"] / CHARS_PER_TOKEN for entry in CONTENT["questions"])
    assert len(offsets) == 3
    assert offsets[0] > 4000 and offsets[-1] < len(OPENING) / CHARS_PER_TOKEN - 1000
    assert all(later - earlier > 2048 for earlier, later in pairwise(offsets))


def test_the_books_answers_lie_behind_the_opening() -> None:
    assert len(CONTENT["book_questions"]) == 3
    assert all(entry["char_offset"] > len(OPENING) for entry in CONTENT["book_questions"])


def test_the_book_is_whole_and_clean() -> None:
    assert len(BOOK.split()) >= 100_000
    assert BOOK.isascii() or set(BOOK) - set(map(chr, range(128))) == {"—"}
    assert not set("\r\t\\#*") & set(BOOK)
    assert "\n\n\n" not in BOOK and BOOK.endswith(".\n")
    assert BOOK.count("\nCHAPTER ") == 18


def test_the_opening_ends_at_a_chapter() -> None:
    assert BOOK[CONTENT["opening_chars"] :].startswith("CHAPTER IV - ")
    assert 70_000 < len(OPENING) < 100_000


def test_title_and_licence_are_stated() -> None:
    assert CONTENT["title"].upper() in BOOK[:100] and CONTENT["author"] in BOOK[:100]
    assert CONTENT["licence"].startswith("Public domain") and CONTENT["source"]
