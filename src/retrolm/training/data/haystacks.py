"""What statements are hidden in: prose, passages or filler sentences, cut so that a text has its length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ...planting import plant, spread
from .context import BuildContext
from .fact_wordings import FILLER_SENTENCES
from .frames import Frame
from .pieces import Piece, Role
from .sample import TokenArray


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
        fact_piece(context.encoder.encode(spaced.format(statement)), wanted, number)
        for statement, wanted, number in zip(statements, is_evidence, answers or [-1] * len(statements), strict=True)
    ]
    room = max(0, context.room(frame, needles, num_tokens))
    straw = HAYSTACK_MAKERS[haystack](context, room, rng)
    pieces, _ = plant(straw, needles, spread(rng, len(straw) + 1, len(needles)))
    return pieces


def fact_piece(ids: TokenArray, is_evidence: bool, further: int) -> Piece:
    """A statement; `further` is the further question that it answers, or -1."""
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


HAYSTACK_MAKERS = {"prose": _prose, "passages": _passages, "filler": _filler}
