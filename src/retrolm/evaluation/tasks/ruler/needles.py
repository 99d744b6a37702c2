"""The eight needle-in-a-haystack tasks of RULER (specification: arXiv:2404.06654, table of NIAH configurations)."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..generator import Draft, Generator, find_spans, split_template
from .haystack import Essay
from .wordlists import compound, fingerprint

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
DEPTHS = [round(100 * step / 39) for step in range(40)]

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class NeedleConfig:
    """What is hidden in what, and how much of it is asked for."""

    haystack: Literal["noise", "essay", "needle"]
    keys: Kind
    values: Kind
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NEEDLE_TASKS = {
    "niah_single_1": NeedleConfig("noise", "words", "numbers"),
    "niah_single_2": NeedleConfig("essay", "words", "numbers"),
    "niah_single_3": NeedleConfig("essay", "words", "uuids"),
    "niah_multikey_1": NeedleConfig("essay", "words", "numbers", num_keys=4),
    "niah_multikey_2": NeedleConfig("needle", "words", "numbers"),
    "niah_multikey_3": NeedleConfig("needle", "uuids", "uuids"),
    "niah_multivalue": NeedleConfig("essay", "words", "numbers", num_values=4),
    "niah_multiquery": NeedleConfig("essay", "words", "numbers", num_keys=4, num_queries=4),
}


def random_text(kind: Kind, rng: random.Random) -> str:
    """Draw a key or value: an adjective-noun pair, a seven-digit number or a version-4 UUID."""
    if kind == "words":
        return compound(rng)
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def template_of(config: NeedleConfig) -> tuple[str, str, str]:
    """Return (prompt template, answer prefix, name of the value's kind), in the singular if one value is asked for."""
    if config.num_queries * config.num_values > 1:
        return TEMPLATE, PREFIX, config.values
    singular = [_singular(text) for text in (TEMPLATE, PREFIX)]
    return singular[0], singular[1], config.values[:-1]


def _singular(text: str) -> str:
    for plural, single in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(plural, single)
    return text


class NeedleGenerator(Generator):
    """Hides needles; a unit is a word (essay) or a line (noise and needle haystacks)."""

    def __init__(self, config: NeedleConfig, length: int, essay: Essay | None = None) -> None:
        self._config = config
        self._essay = essay
        small = length < 4096 and config.haystack != "essay"
        self.step = 500 if config.haystack == "essay" else 5 if small else 25

    @cached_property
    def _num_needles(self) -> int:
        return self._config.num_keys * self._config.num_values

    def smallest(self, index: int) -> int:
        """See `Generator`: one line for each needle to stand in front of."""
        return self._num_needles

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        source = self._essay.fingerprint if self._essay else self._config.haystack
        return {"haystack": source, "words": fingerprint(), "sentences": "regex"}

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        config = self._config
        values = _draw_values(config, rng)
        needles = [NEEDLE.format(kind=config.values, key=key, value=value) for key in values for value in values[key]]
        asked = rng.sample(list(values), config.num_queries)
        gold = [NEEDLE.format(kind=config.values, key=key, value=value) for key in asked for value in values[key]]
        rng.shuffle(needles)
        text, depths = self._hide(needles, size, set(values), rng)
        template, prefix, kind = template_of(config)
        query = _enumerate(asked)
        context, question = split_template(template, text, kind=kind, query=query)
        answers = [value for key in asked for value in values[key]]
        extra = {"haystack": self._essay.source if self._essay else config.haystack, "depths": depths}
        prefix = prefix.format(kind=kind, query=query)
        return Draft(context, question, prefix, answers, find_spans(context, gold), extra)

    def _hide(self, needles: list[str], size: int, taken: set[str], rng: random.Random) -> tuple[str, list[float]]:
        """Return the haystack with its needles, and their depths in percent in order of their places."""
        if self._essay is not None:
            return _hide_in_essay(needles, self._essay.sentences(size), rng)
        lines = [NOISE] * size if self._config.haystack == "noise" else self._distractors(size, taken, rng)
        places = sorted(rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines), [round(100 * place / size, 1) for place in reversed(places)]

    def _distractors(self, size: int, taken: set[str], rng: random.Random) -> list[str]:
        """Needles for keys that are not asked for, and never equal to one that is."""
        kind = self._config.values
        lines: list[str] = []
        while len(lines) < size:
            key, value = random_text(self._config.keys, rng), random_text(kind, rng)
            if key not in taken:
                lines.append(NEEDLE.format(kind=kind, key=key, value=value))
        return lines


def _draw_values(config: NeedleConfig, rng: random.Random) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    while len(values) < config.num_keys:
        key = random_text(config.keys, rng)
        values[key] = [random_text(config.values, rng) for _ in range(config.num_values)]
    return values


def _hide_in_essay(needles: list[str], sentences: list[str], rng: random.Random) -> tuple[str, list[float]]:
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    cuts = [0, *(int(len(sentences) * depth / 100) for depth in depths), len(sentences)]
    pieces = [" ".join(sentences[start:end]) for start, end in itertools.pairwise(cuts)]
    parts = [pieces[0]]
    for needle, piece in zip(needles, pieces[1:], strict=True):
        parts += [needle, piece]
    return " ".join(parts), [float(depth) for depth in depths]


def _enumerate(keys: Sequence[str]) -> str:
    return ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
