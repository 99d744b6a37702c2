"""What every sample builder works with, and the steps that builders share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .config import PASSAGE_QUERY_KINDS, SYNTHETIC_KINDS, Stage1DataConfig
from .encoder import TextEncoder
from .frames import Frame
from .keys import WORDS
from .passage_queries import keyword_question
from .pieces import Piece, Role, cut_to_length, drop_surplus, further_spans, join, total_length
from .pool import QuestionRow, TokenPool
from .sample import FurtherQuestion, Span, Stage1Sample, TokenArray

_MIN_SLICE, _MAX_SLICE = 100, 500
_MIN_LETTERS = 4
Asked = tuple[str, str]  # a question, and how its answer begins (mostly "")


@dataclass(frozen=True)
class BuildContext:
    """Pool, encoder and settings, for one split of the data."""

    pool: TokenPool
    encoder: TextEncoder
    config: Stage1DataConfig
    split: str

    @cached_property
    def books(self) -> NDArray[np.int64]:
        """Indices of the books of this split (of all books if the split has none)."""
        books = self.pool.books_of(self.split)
        return books if len(books) else np.arange(self.pool.num_books)

    @cached_property
    def passages_by_source(self) -> list[NDArray[np.int64]]:
        """Passage indices, one array per source that has any."""
        source = self.pool.arrays["passage_source"]
        return [np.flatnonzero(source == number) for number in np.unique(source)]

    @cached_property
    def natural_rows(self) -> list[NDArray[np.int64]]:
        """Question rows that people wrote, one array per source that has a weight and any rows in this split."""
        made = {*PASSAGE_QUERY_KINDS, *SYNTHETIC_KINDS}
        names = [name for name, weight in self.config.weights.items() if weight > 0 and name not in made]
        return [rows for name in names if len(rows := self.pool.rows_of(name, self.split))]

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Words that keys are made of: the pool's common ones and those that facts have anyway."""
        common = (word for word in self.pool.common_words if word.isalpha() and len(word) >= _MIN_LETTERS)
        return tuple(sorted({*WORDS, *common}))

    @cached_property
    def keyword_rows(self) -> NDArray[np.int64]:
        """Rows whose question is a list of keywords."""
        return self.pool.rows_of("keywords", self.split)

    @cached_property
    def _asking(self) -> tuple[list[NDArray[np.int64]], list[float]]:
        """Question rows with one positive by source, and the sources' weights."""
        names = [name for name, weight in self.config.weights.items() if weight > 0 and name not in SYNTHETIC_KINDS]
        single = np.diff(self.pool.arrays["row_positive_offsets"]) == 1
        rows = {name: found[single[found]] for name in names if len(found := self.pool.rows_of(name, self.split))}
        return [r for r in rows.values() if len(r)], [self.config.weights[n] for n, r in rows.items() if len(r)]

    @cached_property
    def _asking_by_passage(self) -> dict[int, list[tuple[int, float]]]:
        """Passage -> the questions that it alone answers, as (row, weight)."""
        first = self.pool.arrays["row_positive_offsets"]
        positives = self.pool.arrays["row_positives"]
        found: dict[int, list[tuple[int, float]]] = {}
        for rows, weight in zip(*self._asking, strict=True):
            for row in rows.tolist():
                found.setdefault(int(positives[first[row]]), []).append((row, weight))
        return found

    def random_row(self, rng: random.Random) -> QuestionRow | None:
        """Draw a question with one positive: a source by weight, then one of its questions."""
        sources, weights = self._asking
        if not sources:
            return None
        rows = rng.choices(sources, weights)[0]
        return self.pool.row(int(rows[rng.randrange(len(rows))]))

    def row_on(self, passage: int, rng: random.Random) -> QuestionRow | None:
        """Draw a question that a passage alone answers, sources by weight; None if there is none."""
        rows = self._asking_by_passage.get(passage)
        if not rows:
            return None
        return self.pool.row(rng.choices([row for row, _ in rows], [weight for _, weight in rows])[0])

    def wording(self, row: QuestionRow, rng: random.Random) -> str:
        """How a row's question is put."""
        return keyword_question(row.query, rng) if row.source == "keywords" else row.query

    def random_passage(self, rng: random.Random) -> int:
        """Draw a passage: a source at random, then one of its passages."""
        passages = rng.choice(self.passages_by_source)
        return int(passages[rng.randrange(len(passages))])

    def prose(self, rng: random.Random, num_tokens: int) -> tuple[TokenArray, list[int]]:
        """Return `num_tokens` tokens of consecutive book prose and the offsets at which its sentences begin.

        Begins at a sentence; goes on with further books where one is too short.
        """
        parts: list[TokenArray] = []
        starts: list[int] = []
        have = 0
        while have < num_tokens:
            ids, sentences = self._stretch(rng, num_tokens - have)
            parts.append(ids)
            starts += [have + offset for offset in sentences]
            have += len(ids)
        return np.concatenate(parts) if parts else np.zeros(0, np.int32), starts

    def _stretch(self, rng: random.Random, num_tokens: int) -> tuple[TokenArray, list[int]]:
        book = int(self.books[rng.randrange(len(self.books))])
        sentences = self.pool.book_sentences(book)
        end = int(self.pool.arrays["book_offsets"][book + 1])
        last = max(1, int(np.searchsorted(sentences, end - num_tokens, side="right")))
        start = int(sentences[rng.randrange(last)])
        stop = min(end, start + num_tokens)
        inside = sentences[(sentences >= start) & (sentences < stop)] - start
        return self.pool.book_tokens(start, stop), inside.tolist()

    def prose_slices(self, rng: random.Random, num_tokens: int) -> Iterator[TokenArray]:
        """Yield consecutive prose in slices of 100 to 500 tokens that begin at sentences."""
        ids, starts = self.prose(rng, num_tokens + _MAX_SLICE)
        begin = 0
        for start in starts:
            if start - begin >= rng.randint(_MIN_SLICE, _MAX_SLICE):
                yield ids[begin:start]
                begin = start
        yield ids[begin:]

    def finish(
        self,
        frame: Frame,
        pieces: Sequence[Piece],
        question: str,
        source: str,
        num_tokens: int,
        rng: random.Random,
        answer_prefix: str = "",
        further: Sequence[Asked] = (),
    ) -> Stage1Sample:
        """Put a frame around pieces in their final order and cut the fillers so that the text has `num_tokens`.

        `further` are the questions whose numbers pieces carry; those whose evidence has been cut are left out.
        """
        instruction = Piece(self.encoder.encode_repeated(frame.instruction), Role.FILLER)
        room = num_tokens - len(instruction)
        body = cut_to_length(drop_surplus(pieces, room, rng), room, rng)
        ids, evidence, masked = _behind(instruction.ids, *join(body))
        asked = further_spans([instruction, *body])
        return Stage1Sample(
            input_ids=ids,
            question_ids=self._framed(frame, question, answer_prefix),
            prefix_ids=self.encoder.prefix_ids,
            positive_spans=evidence,
            source=source,
            masked_spans=masked,
            further=tuple(
                FurtherQuestion(self._framed(frame, *further[number]), tuple(spans))
                for number, spans in sorted(asked.items())
            ),
        )

    def _framed(self, frame: Frame, question: str, answer_prefix: str) -> TokenArray:
        return self.encoder.question_ids(frame.question.format(question=question), answer_prefix)

    def room(self, frame: Frame, pieces: Sequence[Piece], num_tokens: int) -> int:
        """Return how many more tokens fit a text of `num_tokens` beside some pieces."""
        return num_tokens - len(self.encoder.encode_repeated(frame.instruction)) - total_length(pieces)


def _behind(
    head: TokenArray, ids: TokenArray, evidence: tuple[Span, ...], masked: tuple[Span, ...]
) -> tuple[TokenArray, tuple[Span, ...], tuple[Span, ...]]:
    shift = len(head)
    moved = tuple((start + shift, end + shift) for start, end in evidence)
    return np.concatenate([head, ids]), moved, tuple((start + shift, end + shift) for start, end in masked)
