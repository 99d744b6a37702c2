"""Readers for question-answering files: SQuAD's format and the multi-hop ones, each to one form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from .files import read_json, read_rows

_OFFSET_SLACK = 200


@dataclass(frozen=True)
class SquadQuestion:
    """An answerable question; `start` is where its first answer stands in the paragraph (`None` = not found)."""

    id: str
    text: str
    answers: list[str]
    start: int | None


@dataclass(frozen=True)
class SquadParagraph:
    """A paragraph (or whole paper) with its questions; `article` numbers the article it belongs to."""

    article: int
    text: str
    questions: list[SquadQuestion]


@dataclass(frozen=True)
class HopParagraph:
    """A paragraph shown with a multi-hop question; `gold` = needed for the answer."""

    title: str
    text: str
    gold: bool


@dataclass(frozen=True)
class HopQuestion:
    """A multi-hop question with its paragraphs."""

    id: str
    text: str
    answers: list[str]
    paragraphs: list[HopParagraph]


def read_squad(path: Path) -> list[SquadParagraph]:
    """Read SQuAD-format data: the usual nested .json, or rows of {context, qas}; unanswerable questions are dropped.

    Raises `UserError` for another format.
    """
    content = read_json(_existing(path)) if ".json" in path.suffixes else read_rows(_existing(path))
    articles = content["data"] if isinstance(content, dict) and "data" in content else content
    if not isinstance(articles, list) or not articles:
        raise UserError(f"{path} isn't in SQuAD format: expected an object with 'data', or rows with 'context'.")
    paragraphs = []
    for number, article in enumerate(articles):
        for entry in article.get("paragraphs", [article]):
            paragraphs.append(_squad_paragraph(entry, number, path))
    return paragraphs


def _squad_paragraph(entry: dict[str, Any], article: int, path: Path) -> SquadParagraph:
    try:
        text = entry["context"]
        rows = [row for row in entry["qas"] if row["answers"]]
    except KeyError as error:
        raise UserError(f"{path} isn't in SQuAD format: article {article} has no {error}.") from error
    name = entry.get("document_id", article)
    questions = [_squad_question(row, text, f"{name}-{number}") for number, row in enumerate(rows)]
    return SquadParagraph(article, text, questions)


def _squad_question(row: dict[str, Any], text: str, name: str) -> SquadQuestion:
    answers = list(dict.fromkeys(answer["text"].strip() for answer in row["answers"]))
    start = _nearest(text, answers[0], row["answers"][0]["answer_start"])
    return SquadQuestion(str(row.get("id", name)), row["question"], answers, start)


def _nearest(text: str, answer: str, start: int) -> int | None:
    """Where the answer stands nearest to where the file says (some files are off by a few characters)."""
    low = max(start - _OFFSET_SLACK, 0)
    places = []
    place = text.find(answer, low)
    while 0 <= place <= start + _OFFSET_SLACK:
        places.append(place)
        place = text.find(answer, place + 1)
    return min(places, key=lambda found: abs(found - start)) if places else None


def read_multihop(path: Path) -> list[HopQuestion]:
    """Read HotpotQA's and 2WikiMultihopQA's .json, MuSiQue's .jsonl, or rows of {question, answers, paragraphs}.

    Raises `UserError` for another format.
    """
    return [_hop_question(row, path) for row in read_rows(_existing(path))]


def _hop_question(row: dict[str, Any], path: Path) -> HopQuestion:
    try:
        answers = row["answers"] if "answers" in row else [row["answer"], *row.get("answer_aliases", [])]
        name = str(row["_id"] if "_id" in row else row["id"])
        return HopQuestion(name, row["question"], answers, _hop_paragraphs(row))
    except KeyError as error:
        raise UserError(f"{path} isn't a multi-hop question file: a row has no {error}.") from error


def _hop_paragraphs(row: dict[str, Any]) -> list[HopParagraph]:
    if "paragraphs" in row:
        body = "text" if "text" in row["paragraphs"][0] else "paragraph_text"
        return [HopParagraph(part["title"], part[body], part["is_supporting"]) for part in row["paragraphs"]]
    gold = {title for title, _ in row["supporting_facts"]}
    return [HopParagraph(title, "".join(sentences), title in gold) for title, sentences in row["context"]]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist. Give the path of a question file.")
    return path
