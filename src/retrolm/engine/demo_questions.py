"""The questions that come with the example book: read from the source checkout's `examples` folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .text_files import read_text_file

EXAMPLES = Path(__file__).parents[3] / "examples"
QUESTIONS_FILE = "questions.json"


@dataclass(frozen=True)
class ExpectedAnswer:
    """A question and the answer that was written down beforehand; `evidence` quotes the text, where it is known."""

    question: str
    expected: str
    evidence: str = ""


@dataclass(frozen=True)
class Example:
    """A book, its opening, and questions to both.

    Attributes:
        text: what is read: the opening, or the whole book.
    """

    title: str
    author: str
    text: str
    questions: tuple[ExpectedAnswer, ...]


def load_example(folder: Path, whole_book: bool) -> Example:
    """Read the example in `folder`, as a source checkout has one.

    Raises:
        UserError: the folder isn't there (an installed package has none), or lacks what it should hold.
    """
    path = folder / QUESTIONS_FILE
    if not path.is_file():
        raise UserError(
            f"The demo needs the source checkout: {path} is missing. Clone the repository and run `make demo`."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        questions = _questions(content["book_questions" if whole_book else "questions"])
        book, opening_chars = folder / content["book"], int(content["opening_chars"])
        title, author = str(content["title"]), str(content["author"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{path} can't be used: {reason}. Restore it from the repository.") from None
    if not questions:
        raise UserError(f"{path} has no questions for this part of the book. Add some, or read the other part.")
    text = read_text_file(book)
    return Example(title, author, text if whole_book else text[:opening_chars], questions)


def _questions(entries: list[dict[str, Any]]) -> tuple[ExpectedAnswer, ...]:
    return tuple(
        ExpectedAnswer(str(entry["question"]), str(entry["expected"]), str(entry.get("evidence", "")))
        for entry in entries
    )
