"""Facts of one wording, stated in random order, and questions for some of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...planting import GENERATORS, Fact
from .context import Asked
from .fact_wordings import Wording, draw_question, draw_wording, listed
from .keys import PLENTIFUL_KINDS, draw_facts, maker

_SEVERAL_VALUES_SHARE = 0.1
_MOST_KEYS_WITH_SEVERAL_VALUES = 16
_SEVERAL_KEYS_SHARE = 0.15
_REVERSE_SHARE = 0.12
_MIXED_FORMS_SHARE = 0.3
_DECOY_SHARE = 0.2
_LOOK_ALIKE_SHARE = 0.3
_ANSWER_PREFIX_SHARE = 0.35


@dataclass(frozen=True)
class Quiz:
    """Statements of facts and questions on them.

    Attributes:
        is_evidence: which statements answer the question. asked: the keys that it is about.
        further: questions on other keys. answers: which of them each statement answers, or -1.
    """

    statements: list[str]
    is_evidence: list[bool]
    question: str
    answer_prefix: str
    asked: tuple[str, ...]
    further: list[Asked]
    answers: list[int]


def draw_quiz(
    rng: random.Random,
    wording: Wording,
    num_keys: int,
    most_further: int = 0,
    split: str = "train",
    named: bool = False,
) -> Quiz:
    """Draw facts of one wording, a question for some of them and at most `most_further` for others.

    Now and then facts in other wordings of the split stand beside them, or keys are hard to tell apart.

    Args:
        named: questions say what they ask for, since facts of another kind may be known of the same key.
    """
    several = num_keys <= _MOST_KEYS_WITH_SEVERAL_VALUES and rng.random() < _SEVERAL_VALUES_SHARE
    key_kind = rng.choice(wording.key_kinds)
    value_kind = rng.choice(_beside(key_kind, wording.value_kinds))
    facts = draw_facts(
        rng,
        num_keys,
        maker(rng, key_kind),
        maker(rng, value_kind),
        values_per_key=rng.randint(2, 4) if several else 1,
        alike=draw_likeness(rng) if key_kind in PLENTIFUL_KINDS else 0.0,
    )
    has_decoys = rng.random() < _DECOY_SHARE
    quiz = quiz_on(rng, some_forms(rng, wording), facts, most_further, named or has_decoys)
    return with_decoys(rng, quiz, wording, split) if has_decoys else quiz


def _beside(key_kind: str, value_kinds: Sequence[str]) -> Sequence[str]:
    """Kinds of values other than that of the keys, where there are too few strings of it for both (104 cities)."""
    others = [kind for kind in value_kinds if kind != key_kind or kind in PLENTIFUL_KINDS]
    return others or value_kinds


def draw_likeness(rng: random.Random) -> float:
    """Draw the share of keys that are look-alikes of others: none, mostly."""
    return rng.choice((0.3, 0.6, 0.9)) if rng.random() < _LOOK_ALIKE_SHARE else 0.0


def some_forms(rng: random.Random, wording: Wording) -> Wording:
    """Keep one form of statement, most of the time, or all."""
    return (
        wording if rng.random() < _MIXED_FORMS_SHARE else replace(wording, statements=(rng.choice(wording.statements),))
    )


def quiz_on(
    rng: random.Random, wording: Wording, facts: Sequence[Fact], most_further: int = 0, named: bool = False
) -> Quiz:
    """State facts in random order, ask for one key or a few, and at most `most_further` times for others."""
    groups = _groups(rng, len(facts), most_further)
    group_of = {number: place for place, group in enumerate(groups) for number in group}
    order = [(number, value) for number, fact in enumerate(facts) for value in fact.values]
    rng.shuffle(order)
    statements = [_state(rng.choice(wording.statements), facts[number].key, value) for number, value in order]
    asked = [[facts[number] for number in sorted(group)] for group in groups]
    (question, prefix), *further = [_ask(rng, wording, group, named) for group in asked]
    answers = [group_of.get(number, -1) for number, _ in order]
    keys = tuple(fact.key for fact in asked[0])
    is_evidence = [place == 0 for place in answers]
    return Quiz(statements, is_evidence, question, prefix, keys, further, [max(place - 1, -1) for place in answers])


def _groups(rng: random.Random, count: int, most_further: int) -> list[list[int]]:
    """The facts that each question is about, the own one's first: one, or two to four at once."""
    left, groups = rng.sample(range(count), count), list[list[int]]()
    while left and len(groups) <= most_further:
        size = rng.randint(2, 4) if rng.random() < _SEVERAL_KEYS_SHARE else 1
        groups.append(left[:size])
        left = left[size:]
    return groups


def _state(form: str, key: str, value: str) -> str:
    return form.replace("{key}", key).replace("{value}", value)


def with_decoys(rng: random.Random, quiz: Quiz, wording: Wording, split: str = "train") -> Quiz:
    """Add one to three facts of other kinds on the asked keys, so that the key alone doesn't find the answer."""
    statements, is_evidence, answers = list(quiz.statements), list(quiz.is_evidence), list(quiz.answers)
    for other in _others(rng, wording, split):
        value = GENERATORS[rng.choice(other.value_kinds)](rng)
        place = rng.randint(0, len(statements))
        statements.insert(place, _state(rng.choice(other.statements), rng.choice(quiz.asked), value))
        is_evidence.insert(place, False)
        answers.insert(place, -1)
    return replace(quiz, statements=statements, is_evidence=is_evidence, answers=answers)


def _others(rng: random.Random, wording: Wording, split: str) -> Iterator[Wording]:
    """Wordings that none of this one's questions could mean."""
    for other in [draw_wording(rng, split) for _ in range(rng.randint(1, 3))]:
        alike = other.paraphrases and other.paraphrases == wording.paraphrases
        if other.questions != wording.questions and not alike:
            yield other


def _ask(rng: random.Random, wording: Wording, facts: Sequence[Fact], named: bool) -> Asked:
    if len(facts) == 1 and len(facts[0].values) == 1 and wording.reverse and rng.random() < _REVERSE_SHARE:
        return rng.choice(wording.reverse).replace("{value}", facts[0].values[0]), ""
    keys = listed([fact.key for fact in facts])
    prefix = rng.choice(wording.answers) if rng.random() < _ANSWER_PREFIX_SHARE else ""
    return draw_question(rng, wording, named).replace("{key}", keys), prefix.replace("{key}", keys)


def together(rng: random.Random, quizzes: Sequence[Quiz], most_further: int) -> Quiz:
    """All facts in one text, in random order: the first quiz's question, and the others' questions as further ones."""
    found = in_turn(quizzes, most_further)
    rows = list(zip(found.statements, found.is_evidence, found.answers, strict=True))
    rng.shuffle(rows)
    statements, evidence, answers = (list(column) for column in zip(*rows, strict=True))
    return replace(found, statements=statements, is_evidence=evidence, answers=answers)


def in_turn(quizzes: Sequence[Quiz], most_further: int) -> Quiz:
    """All facts in one text, quiz after quiz: the first one's question, the others' questions as further ones."""
    first, further = quizzes[0], list(quizzes[0].further)
    statements, evidence, answers = list(first.statements), list(first.is_evidence), list(first.answers)
    for quiz in quizzes[1:]:
        own = len(further)
        further += [(quiz.question, quiz.answer_prefix), *quiz.further]
        moved = (own if wanted else own + 1 + answer if answer >= 0 else -1
                 for wanted, answer in zip(quiz.is_evidence, quiz.answers, strict=True))  # fmt: skip
        answers += moved
        statements += quiz.statements
        evidence += [False] * len(quiz.statements)
    kept = [answer if answer < most_further else -1 for answer in answers]
    return replace(first, statements=statements, is_evidence=evidence, further=further[:most_further], answers=kept)
