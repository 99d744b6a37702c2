"""Registers: texts, or stretches of them, that are nothing but key-value statements of one wording or a few.

Every other page looks like the one asked for, so only the key tells them apart: the hardest haystack there is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from ...planting import plant, spread
from .context import BuildContext
from .fact_wordings import Wording, draw_heading, draw_line_wording, draw_wording
from .frames import draw_frame
from .haystacks import HAYSTACK_MAKERS, fact_piece
from .keys import PLENTIFUL_KINDS, Maker, draw_facts, maker
from .pieces import Piece, Role, total_length
from .quizzes import Quiz, draw_likeness, in_turn, quiz_on, some_forms, together
from .sample import Stage1Sample

_FAMILIES = (
    ("word_pair", "term", "term"),
    ("number", "long_number"),
    ("plate", "code", "address"),
    ("uuid", "uuid", "hash", "hex"),
    ("person", "invented", "handle"),
)
_SHAPES = ("whole", "several", "stretches")
_SHAPE_WEIGHTS = (50, 20, 30)
_MOST_REGISTERS = 4
_HAYSTACKS = ("prose", "passages", "filler")
_LINES_SHARE = 0.4
_HEADING_SHARE = 0.3
_OWN_KIND_SHARE = 0.4
_SAME_KIND_SHARE = 0.25
_SEVERAL_VALUES_SHARE = 0.1
_STRETCH_TOKENS = 160  # more than a page
_TRIAL_LINES = 32
_SPARE = 1.2  # lines differ in length; what is too much is dropped


def register_sample(context: BuildContext, source: str, num_tokens: int, rng: random.Random) -> Stage1Sample:
    """Build a text of `num_tokens` made of registers, or of prose with registers in it; ask for some of their keys."""
    frame = draw_frame(rng, context.config.paper_format)
    room = context.room(frame, (), num_tokens)
    shape = rng.choices(_SHAPES, weights=_SHAPE_WEIGHTS)[0]
    if shape == "stretches":
        share = max(rng.uniform(0.1, 0.7), min(1.0, _STRETCH_TOKENS / max(1, room)))
        quiz = in_turn(*_draw_registers(context, rng.randint(1, 2), int(share * room), rng))
        pieces = _in_haystack(context, _pieces(context, quiz, room), room, rng)
    else:
        count = 1 if shape == "whole" else rng.randint(2, _MOST_REGISTERS)
        registers = _draw_registers(context, count, room, rng)
        quiz = together(rng, *registers) if shape == "several" and rng.random() < 0.5 else in_turn(*registers)
        pieces = _pieces(context, quiz, room)
    return context.finish(frame, pieces, quiz.question, source, num_tokens, rng, quiz.answer_prefix, quiz.further)


def _draw_registers(context: BuildContext, count: int, num_tokens: int, rng: random.Random) -> tuple[list[Quiz], int]:
    """Draw registers that share `num_tokens` evenly, and the number of further questions on all of them."""
    most, registers, taken = context.config.further_questions, list[Quiz](), set[str]()
    spaced = rng.choice(("{}\n", "{}\n", "{}\n", "{}\n\n", " {}"))
    for _ in range(count):
        registers.append(_draw_register(context, num_tokens // count, most // count, count > 1, spaced, taken, rng))
    rng.shuffle(registers)  # the first one's question is the sample's own
    return registers, most


def _draw_register(
    context: BuildContext,
    num_tokens: int,
    most_further: int,
    named: bool,
    spaced: str,
    taken: set[str],
    rng: random.Random,
) -> Quiz:
    """Draw at least `num_tokens` tokens of facts of one wording, each with its gap; their keys are added to `taken`."""
    split = context.split
    is_lines = rng.random() < _LINES_SHARE
    wording = draw_line_wording(rng, split) if is_lines else some_forms(rng, draw_wording(rng, split))
    keys, values = (maker(rng, kind, context.vocabulary) for kind in _draw_kinds(rng, wording))
    count = 3 + int(_SPARE * num_tokens / _tokens_per_line(context, wording, keys, values, spaced, rng))
    several = count > _TRIAL_LINES and rng.random() < _SEVERAL_VALUES_SHARE
    values_per_key = rng.randint(2, 4) if several else 1
    num_keys = -(-count // values_per_key)
    facts = draw_facts(rng, num_keys, keys, values, values_per_key, draw_likeness(rng), taken)
    taken |= {fact.key for fact in facts}
    quiz = quiz_on(rng, wording, facts, most_further, named)
    quiz = replace(quiz, statements=[spaced.format(statement) for statement in quiz.statements])
    return _headed(quiz, draw_heading(rng, wording, split)) if rng.random() < _HEADING_SHARE else quiz


def _draw_kinds(rng: random.Random, wording: Wording) -> tuple[str, str]:
    """Draw the kinds of keys and values; families of kinds are equally frequent, whatever the wording is about."""
    key, value = (_draw_kind(rng, kinds) for kinds in (wording.key_kinds, wording.value_kinds))
    return key, key if rng.random() < _SAME_KIND_SHARE else value


def _draw_kind(rng: random.Random, own: Sequence[str]) -> str:
    plentiful = [kind for kind in own if kind in PLENTIFUL_KINDS]
    return rng.choice(plentiful if plentiful and rng.random() < _OWN_KIND_SHARE else rng.choice(_FAMILIES))


def _tokens_per_line(
    context: BuildContext, wording: Wording, keys: Maker, values: Maker, spaced: str, rng: random.Random
) -> float:
    trial = quiz_on(rng, wording, draw_facts(rng, _TRIAL_LINES, keys, values))
    lines = context.encoder.encode_each([spaced.format(statement) for statement in trial.statements])
    return sum(map(len, lines)) / _TRIAL_LINES


def _headed(quiz: Quiz, heading: str) -> Quiz:
    return replace(
        quiz,
        statements=[heading, *quiz.statements],
        is_evidence=[False, *quiz.is_evidence],
        answers=[-1, *quiz.answers],
    )


def _pieces(context: BuildContext, quiz: Quiz, room: int) -> list[Piece]:
    """The statements; those that are asked for stay whole where others can be dropped instead."""
    rows = zip(context.encoder.encode_each(quiz.statements), quiz.is_evidence, quiz.answers, strict=True)
    pieces = [fact_piece(*row) for row in rows]
    if total_length([piece for piece in pieces if _is_asked(piece)]) > room // 2:
        return pieces
    return [replace(piece, role=Role.FIRM) if piece.further >= 0 else piece for piece in pieces]


def _is_asked(piece: Piece) -> bool:
    return piece.further >= 0 or piece.role is Role.EVIDENCE


def _in_haystack(context: BuildContext, facts: Sequence[Piece], room: int, rng: random.Random) -> list[Piece]:
    """Set facts into a haystack in one to four stretches."""
    most = max(1, min(4, total_length(facts) // _STRETCH_TOKENS))
    cuts = [0, *spread(rng, len(facts), rng.randint(1, most) - 1), len(facts)]
    stretches = [list(facts[start:end]) for start, end in pairwise(cuts)]
    straw = HAYSTACK_MAKERS[rng.choice(_HAYSTACKS)](context, max(0, room - total_length(facts)), rng)
    blocks, _ = plant([[piece] for piece in straw], stretches, spread(rng, len(straw) + 1, len(stretches)))
    return [piece for block in blocks for piece in block]
