"""Key-value facts planted in long texts: one to sixteen keys of one wording, one or a few of them asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from ...planting import GENERATORS, Fact, plant, random_facts, spread
from .context import Asked, BuildContext
from .fact_wordings import FILLER_SENTENCES, Wording, draw_line_wording, draw_wording, listed
from .frames import Frame, draw_frame
from .pieces import Piece, Role
from .sample import Stage1Sample, TokenArray

_HAYSTACKS = ("prose", "passages", "filler", "lines")
_HAYSTACK_WEIGHTS = (45, 15, 15, 25)
_SEVERAL_VALUES_SHARE = 0.1
_SEVERAL_KEYS_SHARE = 0.12
_REVERSE_SHARE = 0.12
_MIXED_FORMS_SHARE = 0.3
_DECOY_SHARE = 0.2
_ANSWER_PREFIX_SHARE = 0.35
_TRIAL_LINES = 48
_PLENTIFUL_KINDS = ("number", "uuid", "hex", "plate", "word_pair", "person")  # enough of them for long lists


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


def facts_sample(context: BuildContext, source: str, num_tokens: int, rng: random.Random) -> Stage1Sample:
    """Build a text of `num_tokens` with planted facts and a question for one key (or a few, or for a value's key)."""
    frame = draw_frame(rng, context.config.paper_format)
    haystack = rng.choices(_HAYSTACKS, weights=_HAYSTACK_WEIGHTS)[0]
    if haystack == "lines":
        pieces, quiz = _list_of_facts(context, frame, num_tokens, rng)
    else:
        most = context.config.further_questions
        draw = partial(_draw_quiz, context, rng, most)
        quiz = together(rng, [draw() for _ in range(_num_quizzes(rng))], most) if most else draw()
        pieces = hide(context, frame, quiz.statements, quiz.is_evidence, haystack, num_tokens, rng, quiz.answers)
    return context.finish(frame, pieces, quiz.question, source, num_tokens, rng, quiz.answer_prefix, quiz.further)


def _num_quizzes(rng: random.Random) -> int:
    """Draw one or, as often, several kinds of facts: then it takes the wording as well to find the one asked for."""
    return rng.choice((1, rng.randint(2, 6)))


def _draw_quiz(context: BuildContext, rng: random.Random, most_further: int) -> Quiz:
    wording = draw_wording(rng, context.split)
    return draw_quiz(rng, wording, _num_keys(rng, context.config.max_keys), most_further, context.split)


def together(rng: random.Random, quizzes: Sequence[Quiz], most_further: int) -> Quiz:
    """All facts in one text, in random order: the first quiz's question, and the others' questions as further ones."""
    first, rows, further = quizzes[0], [], list(quizzes[0].further)
    for number, quiz in enumerate(quizzes):
        own, begin = len(further), len(further) + 1
        if number:
            further += [(quiz.question, quiz.answer_prefix), *quiz.further]
        for statement, is_evidence, answer in zip(quiz.statements, quiz.is_evidence, quiz.answers, strict=True):
            moved = answer if not number else own if is_evidence else answer + begin if answer >= 0 else -1
            rows.append((statement, is_evidence and not number, moved if moved < most_further else -1))
    rng.shuffle(rows)
    statements, evidence, answers = (list(column) for column in zip(*rows, strict=True))
    return replace(first, statements=statements, is_evidence=evidence, further=further[:most_further], answers=answers)


def _num_keys(rng: random.Random, most: int) -> int:
    """Draw 1 key, a few or many, so that single facts and crowded texts are equally frequent."""
    return min(most, rng.choice((1, 1, rng.randint(2, 4), rng.randint(4, 8), rng.randint(8, 16))))


def draw_quiz(rng: random.Random, wording: Wording, num_keys: int, most_further: int = 0, split: str = "train") -> Quiz:
    """Draw facts of one wording, a question for some of them and at most `most_further` for others.

    Now and then facts in other wordings of the split stand beside them.
    """
    values_per_key = rng.randint(2, 4) if rng.random() < _SEVERAL_VALUES_SHARE else 1
    kinds = rng.choice(wording.key_kinds), rng.choice(wording.value_kinds)
    facts = random_facts(rng, num_keys, *kinds, values_per_key)
    quiz = quiz_on(rng, some_forms(rng, wording), facts, most_further)
    return with_decoys(rng, quiz, wording, split) if rng.random() < _DECOY_SHARE else quiz


def some_forms(rng: random.Random, wording: Wording) -> Wording:
    """Keep one form of statement, most of the time, or all."""
    return (
        wording if rng.random() < _MIXED_FORMS_SHARE else replace(wording, statements=(rng.choice(wording.statements),))
    )


def quiz_on(rng: random.Random, wording: Wording, facts: Sequence[Fact], most_further: int = 0) -> Quiz:
    """State facts in random order, ask for one key or a few, and for at most `most_further` others one by one."""
    num_asked = min(len(facts), rng.randint(2, 4)) if rng.random() < _SEVERAL_KEYS_SHARE else 1
    asked = set(rng.sample(range(len(facts)), num_asked))
    order = [(number, value) for number, fact in enumerate(facts) for value in fact.values]
    rng.shuffle(order)
    statements = [_state(rng.choice(wording.statements), facts[number].key, value) for number, value in order]
    questioned = [facts[number] for number in sorted(asked)]
    question, prefix = _ask(rng, wording, questioned)
    is_evidence = [number in asked for number, _ in order]
    others = [number for number in range(len(facts)) if number not in asked]
    others = rng.sample(others, min(most_further, len(others))) if most_further else []
    further = [_ask(rng, wording, [facts[number]]) for number in others]
    answers = [others.index(number) if number in others else -1 for number, _ in order]
    return Quiz(statements, is_evidence, question, prefix, tuple(fact.key for fact in questioned), further, answers)


def _state(form: str, key: str, value: str) -> str:
    return form.replace("{key}", key).replace("{value}", value)


def with_decoys(rng: random.Random, quiz: Quiz, wording: Wording, split: str = "train") -> Quiz:
    """Add one to three facts of other kinds on the asked keys, so that the key alone doesn't find the answer."""
    statements, is_evidence, answers = list(quiz.statements), list(quiz.is_evidence), list(quiz.answers)
    drawn = [draw_wording(rng, split) for _ in range(rng.randint(1, 3))]
    for other in (other for other in drawn if other.questions != wording.questions):
        value = GENERATORS[rng.choice(other.value_kinds)](rng)
        place = rng.randint(0, len(statements))
        statements.insert(place, _state(rng.choice(other.statements), rng.choice(quiz.asked), value))
        is_evidence.insert(place, False)
        answers.insert(place, -1)
    return replace(quiz, statements=statements, is_evidence=is_evidence, answers=answers)


def _ask(rng: random.Random, wording: Wording, facts: Sequence[Fact]) -> tuple[str, str]:
    if len(facts) == 1 and len(facts[0].values) == 1 and wording.reverse and rng.random() < _REVERSE_SHARE:
        return rng.choice(wording.reverse).replace("{value}", facts[0].values[0]), ""
    keys = listed([fact.key for fact in facts])
    prefix = rng.choice(wording.answers) if rng.random() < _ANSWER_PREFIX_SHARE else ""
    return rng.choice(wording.questions).replace("{key}", keys), prefix.replace("{key}", keys)


def hide(
    context: BuildContext,
    frame: Frame,
    statements: Sequence[str],
    is_evidence: Sequence[bool],
    haystack: str,
    num_tokens: int,
    rng: random.Random,
    answers: Sequence[int] = (),
) -> list[Piece]:
    """Plant statements at random places of a haystack of a kind, all together `num_tokens` long with the frame.

    `answers` says which further question each statement answers, or -1; empty = none.
    """
    spaced = "\n{}\n" if haystack == "passages" or rng.random() < 0.2 else " {}"
    needles = [
        _fact_piece(context.encoder.encode(spaced.format(statement)), wanted, number)
        for statement, wanted, number in zip(statements, is_evidence, answers or [-1] * len(statements), strict=True)
    ]
    room = max(0, context.room(frame, needles, num_tokens))
    straw = _HAYSTACK_MAKERS[haystack](context, room, rng)
    pieces, _ = plant(straw, needles, spread(rng, len(straw) + 1, len(needles)))
    return pieces


def _fact_piece(ids: TokenArray, is_evidence: bool, further: int) -> Piece:
    return Piece(ids, Role.EVIDENCE if is_evidence else Role.FILLER, further=further)


def _prose(context: BuildContext, room: int, rng: random.Random) -> list[Piece]:
    ids, starts = context.prose(rng, room)
    bounds = [*starts, len(ids)]
    return [Piece(ids[start:end]) for start, end in pairwise(bounds)]


def _passages(context: BuildContext, room: int, rng: random.Random) -> list[Piece]:
    gap = context.encoder.encode_repeated("\n\n")
    pieces: list[Piece] = []
    while room > 0:
        ids = context.pool.passage(context.random_passage(rng))[: context.config.max_passage_tokens]
        pieces.append(Piece(np.concatenate([ids, gap])))
        room -= len(pieces[-1])
    return pieces


def _filler(context: BuildContext, room: int, rng: random.Random) -> list[Piece]:
    group = " ".join(rng.sample(FILLER_SENTENCES, rng.randint(1, 6))) + rng.choice(("\n", " ", "\n\n"))
    ids = context.encoder.encode_repeated(group)
    return [Piece(ids)] * (room // len(ids) + 1)


_HAYSTACK_MAKERS = {"prose": _prose, "passages": _passages, "filler": _filler}


def _list_of_facts(
    context: BuildContext, frame: Frame, num_tokens: int, rng: random.Random
) -> tuple[list[Piece], Quiz]:
    """Fill a text with nothing but facts of one wording, as many as fit."""
    split = context.split
    wording = draw_line_wording(rng, split) if rng.random() < 0.5 else some_forms(rng, draw_wording(rng, split))
    kinds = _plentiful(rng, wording.key_kinds), _plentiful(rng, wording.value_kinds)
    gap = rng.choice(("\n", "\n", "\n", "\n\n", " "))
    room = context.room(frame, (), num_tokens)
    trial = quiz_on(rng, wording, random_facts(rng, _TRIAL_LINES, *kinds))
    tokens_per_line = len(context.encoder.encode(gap.join(trial.statements))) / _TRIAL_LINES
    facts = random_facts(rng, int(1.15 * room / tokens_per_line) + 2, *kinds)
    quiz = quiz_on(rng, wording, facts, context.config.further_questions)
    lines = context.encoder.encode_batch([statement + gap for statement in quiz.statements])
    pieces = [
        _fact_piece(np.array(ids, dtype=np.int32), wanted, number)
        for (ids, _), wanted, number in zip(lines, quiz.is_evidence, quiz.answers, strict=True)
    ]
    return pieces, quiz


def _plentiful(rng: random.Random, kinds: Sequence[str]) -> str:
    return rng.choice([kind for kind in kinds if kind in _PLENTIFUL_KINDS] or _PLENTIFUL_KINDS)
