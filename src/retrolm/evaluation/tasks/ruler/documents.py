"""RULER's question answering: the documents that answer a question among many that don't."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import UserError
from ..files import Source, find_file, read_json, read_rows
from ..generator import Draft, Generator, split_template

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
PREFIX = " Answer:"
SQUAD = Source(
    title="A SQuAD file for qa_1",
    places=("ruler/dev-v2.0.json", "squad/dev-v2.0.json", "dev-v2.0.json", "squad_like_eval/xquad.en.json"),
    how="Pass option squad_file=PATH; dev-v2.0.json is in rajpurkar/SQuAD-explorer, xquad.en.json in deepmind/xquad.",
)
HOTPOT = Source(
    title="A HotpotQA file for qa_2",
    places=(
        "ruler/hotpot_dev_distractor_v1.json",
        "hotpotqa/hotpot_dev_distractor_v1.json",
        "hotpot_dev_distractor_v1.json",
        "multihop_dev/hotpot_dev200.jsonl.gz",
    ),
    how="Pass option hotpot_file=PATH; hotpot_dev_distractor_v1.json is at hotpotqa.github.io.",
)


@dataclass(frozen=True)
class Question:
    """A question, its answers, the documents shown with it, and where in them the evidence stands.

    Attributes:
        gold: indices of documents that are always shown.
        related: indices of documents shown before random others (paragraphs of the same article).
        spans: (document index, start, end) of the evidence, in characters.
    """

    text: str
    answers: list[str]
    gold: list[int]
    related: list[int]
    spans: list[tuple[int, int, int]]


@dataclass(frozen=True)
class QuestionSet:
    """Questions over one pool of documents, and the name of the file they come from."""

    questions: list[Question]
    documents: list[str]
    source: str


class DocumentGenerator(Generator):
    """Shows the gold documents among `size` documents; others repeat only when the pool is used up."""

    step = 10

    def __init__(self, questions: QuestionSet) -> None:
        self._set = questions

    def num_samples(self) -> int:
        """See `Generator`: as many as questions."""
        return len(self._set.questions)

    def smallest(self, index: int) -> int:
        """See `Generator`: the gold documents."""
        return len(self._set.questions[index].gold)

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        text = "\n".join([*self._set.documents, *(question.text for question in self._set.questions)])
        return {"source": self._set.source, "hash": hashlib.sha256(text.encode()).hexdigest()[:16]}

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        question = self._set.questions[index]
        shown = self._pick(question, size, rng)
        rng.shuffle(shown)
        blocks = [f"Document {i}:\n{self._set.documents[document]}" for i, document in enumerate(shown, 1)]
        context, tail = split_template(TEMPLATE, "\n\n".join(blocks), query=question.text)
        spans = _spans(question, shown, blocks, len(context) - len("\n\n".join(blocks)))
        return Draft(context, tail, PREFIX, question.answers, spans, {"source": self._set.source})

    def _pick(self, question: Question, size: int, rng: random.Random) -> list[int]:
        missing = size - len(question.gold)
        if missing <= len(question.related):
            return question.gold + rng.sample(question.related, missing)
        missing -= len(question.related)
        known = {*question.gold, *question.related}
        others = [i for i in range(len(self._set.documents)) if i not in known]
        if missing and not others:
            raise UserError(f"{self._set.source} has no documents beyond the gold ones. Use a larger file.")
        rounds, rest = divmod(missing, len(others)) if others else (0, 0)
        return question.gold + question.related + others * rounds + rng.sample(others, rest)


def _spans(question: Question, shown: list[int], blocks: list[str], start: int) -> list[tuple[int, int]]:
    starts: dict[int, int] = {}
    for document, block in zip(shown, blocks, strict=True):
        starts[document] = start + block.index("\n") + 1
        start += len(block) + 2
    return [(starts[document] + begin, starts[document] + end) for document, begin, end in question.spans]


def load_squad(path: Path | str | None, data_dir: Path | str | None) -> QuestionSet:
    """Read answerable questions of a SQuAD-format file; raises `UserError` if it is missing or of another format."""
    place = find_file(SQUAD, data_dir) if path is None else Path(path)
    content = _content(place, SQUAD)
    if not isinstance(content, dict) or "data" not in content:
        raise UserError(f"{place} isn't in SQuAD format: expected an object with 'data'. {SQUAD.how}")
    documents = sorted({paragraph["context"] for article in content["data"] for paragraph in article["paragraphs"]})
    number = {text: index for index, text in enumerate(documents)}
    questions = []
    for article in content["data"]:
        article_documents = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = number[paragraph["context"]]
            related = [document for document in article_documents if document != gold]
            questions += [_squad_question(row, gold, related) for row in paragraph["qas"] if row["answers"]]
    return QuestionSet(questions, documents, place.name)


def _squad_question(row: dict[str, Any], gold: int, related: list[int]) -> Question:
    answers = list(dict.fromkeys(answer["text"] for answer in row["answers"]))
    first = row["answers"][0]
    span = (gold, first["answer_start"], first["answer_start"] + len(first["text"]))
    return Question(row["question"], answers, [gold], related, [span])


def load_hotpot(path: Path | str | None, data_dir: Path | str | None) -> QuestionSet:
    """Read a HotpotQA distractor file (official .json, or rows with `paragraphs`); raises `UserError` as above."""
    place = find_file(HOTPOT, data_dir) if path is None else Path(path)
    if not place.exists():
        raise UserError(f"{place} does not exist. {HOTPOT.how}")
    rows = [_hotpot_row(row, place) for row in read_rows(place)]
    documents = sorted({text for _, _, texts, _ in rows for text in texts})
    number = {text: index for index, text in enumerate(documents)}
    questions = []
    for question, answer, texts, support in rows:
        spans = [(number[text], 0, len(text)) for text in texts if text in support]
        questions.append(Question(question, [answer], [number[text] for text in texts], [], spans))
    return QuestionSet(questions, documents, place.name)


def _hotpot_row(row: dict[str, Any], place: Path) -> tuple[str, str, list[str], set[str]]:
    """Return (question, answer, documents, supporting documents)."""
    if "context" in row:
        titles = {title for title, _ in row["supporting_facts"]}
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]}
        return row["question"], row["answer"], list(texts.values()), {texts[t] for t in titles if t in texts}
    if "paragraphs" not in row:
        raise UserError(f"{place} isn't in HotpotQA format: rows need 'context' or 'paragraphs'. {HOTPOT.how}")
    pairs = {f"{part['title']}\n{part['text']}": part["is_supporting"] for part in row["paragraphs"]}
    return row["question"], row["answers"][0], list(pairs), {text for text, gold in pairs.items() if gold}


def _content(place: Path, source: Source) -> Any:
    if not place.exists():
        raise UserError(f"{place} does not exist. {source.how}")
    return read_json(place)
