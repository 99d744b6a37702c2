"""A question's evidence packed among other texts up to any length, with the evidence's place known."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .generator import Draft, Generator, split_template


@dataclass(frozen=True)
class GoldText:
    """A text that holds evidence, and the evidence's ranges in it (characters)."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class PackedQuestion:
    """A question, the texts that answer it, and texts of its own that don't (shown before any others)."""

    id: str
    text: str
    answers: list[str]
    gold: list[GoldText]
    own: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PackStyle:
    """How packed texts are put into a prompt.

    Attributes:
        template: prompt with {context} and {input}.
        label: stands in front of each text; "{number}" counts from 1.
        joiner: stands between two texts.
        asks_number: the answers are the labels of the gold texts ("Paragraph 3"), not strings of the question.
    """

    template: str
    label: str
    joiner: str
    asks_number: bool = False


class PackGenerator(Generator):
    """Gold texts among `size` whole others: the question's own ones first, then those of the pools in turn.

    Questions come in an order drawn by `seed`. A text whose title (first line) is that of one already shown for the
    question is never used as filler, since it could hold the answer too.
    """

    fit_each = True

    def __init__(self, questions: list[PackedQuestion], pools: list[list[str]], style: PackStyle, seed: int) -> None:
        self._questions = shuffled(questions, random.Random(seed))
        self._pools = pools
        self._style = style
        self._filler = _Remembered(self._draw_filler)

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        texts = [text for pool in self._pools for text in pool] + [question.text for question in self._questions]
        return {"texts": hash_texts(texts), "template": self._style.template}

    def num_samples(self) -> int | None:
        """See `Generator`."""
        return len(self._questions)

    def natural_size(self, index: int) -> int | None:
        """See `Generator`: the question's own texts."""
        return len(self._questions[index].own)

    def largest(self, index: int) -> int | None:
        """See `Generator`: all texts but the gold ones and those that share a title with one shown."""
        question = self._questions[index]
        titles = _titles(question)
        return len(question.own) + sum(_title(text) not in titles for pool in self._pools for text in pool)

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        question = self._questions[index]
        shown: list[GoldText | str] = [*question.gold, *self._filler(index, rng.random())[:size]]
        rng.shuffle(shown)
        text, spans, numbers = _lay_out(shown, self._style)
        context, tail = split_template(self._style.template, text, input=question.text)
        shift = len(context) - len(text)
        spans = [(start + shift, end + shift) for start, end in spans]
        label = self._style.label.split("{number}")[0]
        answers = [f"{label}{number}" for number in numbers] if self._style.asks_number else question.answers
        return Draft(context, tail, "", answers, spans, {"id": question.id})

    def _draw_filler(self, index: int, seed: float) -> list[str]:
        question, rng = self._questions[index], random.Random(seed)
        titles = _titles(question)
        filler = shuffled(question.own, rng)
        for pool in self._pools:
            filler += [text for text in shuffled(pool, rng) if _title(text) not in titles]
        return filler


class ArticleGenerator(Generator):
    """One long gold text among `size` characters of others, the last of which is cut at a word."""

    fit_each = True
    step = 100

    def __init__(self, questions: list[PackedQuestion], articles: list[str], style: PackStyle, seed: int) -> None:
        self._questions = shuffled(questions, random.Random(seed))
        self._articles = articles
        self._style = style

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        texts = self._articles + [question.text for question in self._questions]
        return {"texts": hash_texts(texts), "template": self._style.template}

    def num_samples(self) -> int | None:
        """See `Generator`."""
        return len(self._questions)

    def natural_size(self, index: int) -> int | None:
        """See `Generator`: the gold text alone."""
        return 0

    def largest(self, index: int) -> int | None:
        """See `Generator`: all articles but the gold one."""
        gold = self._questions[index].gold[0].text
        return sum(len(article) for article in self._articles if article != gold)

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        question = self._questions[index]
        gold = question.gold[0]
        others = shuffled([article for article in self._articles if article != gold.text], rng)
        shown: list[GoldText | str] = [*_cut(others, size)]
        shown.insert(rng.randint(0, len(shown)), gold)
        text, spans, _ = _lay_out(shown, self._style)
        context, tail = split_template(self._style.template, text, input=question.text)
        shift = len(context) - len(text)
        spans = [(start + shift, end + shift) for start, end in spans]
        return Draft(context, tail, "", question.answers, spans, {"id": question.id})


def _cut(articles: list[str], size: int) -> list[str]:
    shown = []
    for article in articles:
        if size <= 0:
            break
        shown.append(article if len(article) <= size else article[:size].rpartition(" ")[0])
        size -= len(article)
    return [text for text in shown if text]


def _lay_out(shown: list[GoldText | str], style: PackStyle) -> tuple[str, list[tuple[int, int]], list[int]]:
    """Return the joined texts, the ranges of the evidence in them, and the numbers of the gold texts."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    numbers: list[int] = []
    start = 0
    for number, entry in enumerate(shown, 1):
        label = style.label.format(number=number)
        if isinstance(entry, GoldText):
            spans += [(start + len(label) + begin, start + len(label) + end) for begin, end in entry.spans]
            numbers.append(number)
        parts.append(label + (entry.text if isinstance(entry, GoldText) else entry))
        start += len(parts[-1]) + len(style.joiner)
    return style.joiner.join(parts), spans, numbers


class _Remembered:
    """A function of (index, seed) that keeps its last value: a fit asks for the same one many times in a row."""

    def __init__(self, make: Callable[[int, float], list[str]]) -> None:
        self._make = make
        self._key: tuple[int, float] | None = None
        self._value: list[str] = []

    def __call__(self, index: int, seed: float) -> list[str]:
        if self._key != (index, seed):
            self._key, self._value = (index, seed), self._make(index, seed)
        return self._value


def shuffled(items: list[Any], rng: random.Random) -> list[Any]:
    """A shuffled copy."""
    copy = list(items)
    rng.shuffle(copy)
    return copy


def hash_texts(texts: list[str]) -> str:
    """Hash of a list of texts, for cache keys."""
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:16]


def _title(text: str) -> str:
    return text.partition("\n")[0]


def _titles(question: PackedQuestion) -> set[str]:
    return {_title(text) for text in [*(gold.text for gold in question.gold), *question.own]}
