"""RULER's question answering: the documents that answer a question among many that don't."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import UserError
from ..files import Source, find_file
from ..generator import Draft, Generator, split_template
from ..qa_files import HopParagraph, SquadQuestion, read_multihop, read_squad

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
    paragraphs = read_squad(place)
    documents = sorted({paragraph.text for paragraph in paragraphs})
    number = {text: index for index, text in enumerate(documents)}
    questions = []
    for paragraph in paragraphs:
        article = [number[other.text] for other in paragraphs if other.article == paragraph.article]
        gold = number[paragraph.text]
        related = [document for document in article if document != gold]
        questions += [_squad_question(question, gold, related) for question in paragraph.questions]
    return QuestionSet(questions, documents, place.name)


def _squad_question(question: SquadQuestion, gold: int, related: list[int]) -> Question:
    start, length = question.start, len(question.answers[0])
    spans = [] if start is None else [(gold, start, start + length)]
    return Question(question.text, question.answers, [gold], related, spans)


def load_hotpot(path: Path | str | None, data_dir: Path | str | None) -> QuestionSet:
    """Read HotpotQA questions with their ten documents; raises `UserError` as `load_squad` does."""
    place = find_file(HOTPOT, data_dir) if path is None else Path(path)
    rows = read_multihop(place)
    documents = sorted({_document(part) for row in rows for part in row.paragraphs})
    number = {text: index for index, text in enumerate(documents)}
    questions = []
    for row in rows:
        gold = {_document(part) for part in row.paragraphs if part.gold}
        shown = list(dict.fromkeys(number[_document(part)] for part in row.paragraphs))
        spans = [(number[text], 0, len(text)) for text in sorted(gold)]
        questions.append(Question(row.text, row.answers, shown, [], spans))
    return QuestionSet(questions, documents, place.name)


def _document(part: HopParagraph) -> str:
    return f"{part.title}\n{part.text}"
