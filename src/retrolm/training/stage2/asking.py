"""Long texts that end in questions about themselves, each with its answer: what is read back must be found again.

Two kinds: an excerpt of a book with planted facts, and passages with questions that people asked about them. Questions
and answers are stretches of the text for the loss like any other, in the format in which documents are asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ...errors import UserError
from ...planting import Fact, plant, random_facts, spread
from ..data.fact_wordings import Wording, draw_line_wording, draw_wording
from ..data.frames import draw_frame
from ..data.overlap import EvaluationTexts, file_texts
from ..data.readers import read_pairs
from ..data.rows import Document, PairRow, Passage, RowCounts, content_hash
from ..data.sentences import sentence_starts

CHARS_PER_FACT = 1000
CHARS_PER_TURN = 1500
_LINES_SHARE = 0.3
_SENTENCE_SHARE = 0.25
_MOST_KEYS = 8
_ROWS_PER_DOCUMENT = 40
_MOST_ANSWER_CHARS = 100
_WORST_RANK = 20  # questions whose passage BM25 ranks lower often mean nothing without it ("What size is it?")


@dataclass(frozen=True)
class AskingDocuments:
    """How many documents that end in questions are made, and of what.

    Attributes:
        num_planted: excerpts with planted facts. num_passages: of passages in `rows`.
        rows: questions with passages and answers. chars: length of the longest text; others have half of it or more.
        seed: of everything drawn.
    """

    num_planted: int = 0
    num_passages: int = 0
    rows: Sequence[PairRow] = ()
    chars: int = 42000
    seed: int = 0

    def after(self, document: Document, number: int, num_documents: int) -> Iterator[Document]:
        """Those that follow training document `number` of `num_documents`, evenly spread over all of them."""
        for ordinal in _share(self.num_planted, number, num_documents):
            rng = random.Random(f"{self.seed} planted {ordinal}")
            chars = rng.randint(self.chars // 2, self.chars)
            start = rng.randrange(max(1, len(document.text) - chars))
            yield planted_document(document.title, document.text[start : start + chars], rng)
        for ordinal in _share(self.num_passages, number, num_documents):
            rng = random.Random(f"{self.seed} passages {ordinal}")
            rows = rng.sample(self.rows, min(_ROWS_PER_DOCUMENT, len(self.rows)))
            yield passages_document(rows, rng.randint(self.chars // 2, self.chars), rng)


def answered_rows(folder: Path, drop: Sequence[str], keep_out: Iterable[Path]) -> list[PairRow]:
    """Questions with a short answer of a pooled folder (see `readers`).

    Args:
        drop: sources left out. keep_out: evaluation files; questions and passages they hold are left out.

    Raises:
        UserError: a file that can't be read, or nothing left.
    """
    evaluation = EvaluationTexts(text for path in keep_out for text in file_texts(path))
    known: dict[int, bool] = {}

    def usable(passage: Passage) -> bool:
        key = content_hash(passage.text)
        if key not in known:
            known[key] = not evaluation.shares_passage(passage.text)
        return known[key]

    found = [
        replace(row, negatives=tuple(filter(usable, row.negatives)))
        for row in read_pairs(folder, "pooled", folder.name, RowCounts())
        if row.source not in drop and _is_short(row) and not evaluation.has_question(row.query)
        if all(map(usable, row.positives))
    ]
    if not found:
        raise UserError(f"{folder} holds no question with a short answer. Give a folder with answers in its pairs.")
    return found


def _is_short(row: PairRow) -> bool:
    """Whether a row has a short answer and can be understood by itself."""
    ranked = row.bm25_rank is not None and row.bm25_rank <= _WORST_RANK
    return ranked and bool(row.answers) and len(row.answers[0]) <= _MOST_ANSWER_CHARS


def _share(total: int, number: int, num_documents: int) -> range:
    """Which of `total` things belong to one document of several."""
    return range(total * number // num_documents, total * (number + 1) // num_documents)


def planted_document(title: str, text: str, rng: random.Random) -> Document:
    """Plant random facts between the sentences of a text and ask for some of them.

    Facts come in groups of one wording with up to eight keys, so that the wording alone finds none of them. Their
    number and that of the questions grow with the text.
    """
    statements: list[str] = []
    starts = [*sentence_starts(text), len(text)]
    turns: list[tuple[str, str]] = []
    while len(statements) * CHARS_PER_FACT < len(text):
        wording = draw_line_wording(rng) if rng.random() < _LINES_SHARE else draw_wording(rng)
        facts = random_facts(
            rng, rng.randint(1, _MOST_KEYS), rng.choice(wording.key_kinds), rng.choice(wording.value_kinds)
        )
        form = rng.choice(wording.statements)
        statements += [_filled(form, fact) + " " for fact in facts]
        turns += [_turn(rng, wording, fact) for fact in facts]
    rng.shuffle(statements)
    sentences = [text[start:end] for start, end in pairwise(starts)]
    pieces, _ = plant(sentences, statements, spread(rng, len(sentences), len(statements)))
    rng.shuffle(turns)
    return Document(title, "".join(pieces), tuple(turns[: max(1, len(text) // CHARS_PER_TURN)]))


def passages_document(rows: Sequence[PairRow], chars: int, rng: random.Random) -> Document:
    """Passages of some questions, shuffled, and the questions with their answers.

    Args:
        rows: questions with an answer; their hard negatives fill the text up. chars: about the length of the text.
    """
    asked = rows[: max(1, chars // CHARS_PER_TURN)]
    passages = dict.fromkeys(passage.text for row in asked for passage in row.positives)
    room = chars - sum(map(len, passages))
    for text in dict.fromkeys(passage.text for row in rows for passage in row.negatives):
        if text not in passages and len(text) <= room:
            passages[text] = None
            room -= len(text)
    texts = list(passages)
    rng.shuffle(texts)
    return Document("", "\n\n".join(texts), tuple((_asked(rng, row.query), row.answers[0]) for row in asked))


def _turn(rng: random.Random, wording: Wording, fact: Fact) -> tuple[str, str]:
    """A question for a fact and its answer: the value, now and then as a sentence."""
    beginning = rng.choice(wording.answers) if rng.random() < _SENTENCE_SHARE else ""
    answer = f"{beginning} {fact.values[0]}".replace("{key}", fact.key).strip()
    return _asked(rng, rng.choice(wording.questions).replace("{key}", fact.key)), answer


def _asked(rng: random.Random, question: str) -> str:
    """A question in the product's own frame or one of the training frames."""
    return draw_frame(rng, 0.0).question.replace("{question}", question)


def _filled(form: str, fact: Fact) -> str:
    return form.replace("{key}", fact.key).replace("{value}", fact.values[0])
