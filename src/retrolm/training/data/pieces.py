"""Joining pieces of text into one sample of an exact length, with the places of the evidence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from .sample import Span, TokenArray


class Role(Enum):
    """What a piece is to the sample's own question: evidence, neither evidence nor a fair negative, or a negative.

    Fillers may be cut or dropped; `FIRM` pieces are negatives that stay whole.
    """

    EVIDENCE = "evidence"
    MASKED = "masked"
    FIRM = "firm"
    FILLER = "filler"


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive token ids; `lead` ids stand in front and belong to the piece, but not to the evidence.

    `further` is the number of the further question that the piece answers, or -1.
    """

    ids: TokenArray
    role: Role = Role.FILLER
    lead: TokenArray | None = None
    further: int = -1

    def __len__(self) -> int:
        return len(self.ids) + (0 if self.lead is None else len(self.lead))


def join(pieces: Sequence[Piece]) -> tuple[TokenArray, tuple[Span, ...], tuple[Span, ...]]:
    """Return (ids int32 [T], evidence spans, masked spans) of pieces in the given order."""
    parts: list[TokenArray] = []
    spans: dict[Role, list[Span]] = {role: [] for role in Role}
    place = 0
    for piece in pieces:
        if piece.lead is not None:
            parts.append(piece.lead)
            place += len(piece.lead)
        parts.append(piece.ids)
        if len(piece.ids):
            spans[piece.role].append((place, place + len(piece.ids)))
        place += len(piece.ids)
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    return ids.astype(np.int32, copy=False), tuple(spans[Role.EVIDENCE]), tuple(spans[Role.MASKED])


def further_spans(pieces: Sequence[Piece]) -> dict[int, list[Span]]:
    """Return where, in the joined text, the pieces stand that answer each further question."""
    spans: dict[int, list[Span]] = {}
    place = 0
    for piece in pieces:
        place += len(piece)
        if piece.further >= 0 and len(piece.ids):
            spans.setdefault(piece.further, []).append((place - len(piece.ids), place))
    return spans


def total_length(pieces: Sequence[Piece]) -> int:
    """Return the number of tokens of all pieces together."""
    return sum(map(len, pieces))


def drop_surplus(pieces: Sequence[Piece], num_tokens: int, rng: random.Random, tokens_per_lead: int = 0) -> list[Piece]:
    """Drop fillers, in random order, as long as at least `num_tokens` tokens are left.

    `tokens_per_lead` is what each piece will grow by when it gets its heading.
    """
    total = total_length(pieces) + tokens_per_lead * len(pieces)
    order = list(range(len(pieces)))
    rng.shuffle(order)
    dropped: set[int] = set()
    for index in order:
        length = len(pieces[index]) + tokens_per_lead
        if pieces[index].role is Role.FILLER and total - length >= num_tokens:
            dropped.add(index)
            total -= length
    return [piece for index, piece in enumerate(pieces) if index not in dropped]


def cut_to_length(pieces: Sequence[Piece], num_tokens: int, rng: random.Random) -> list[Piece]:
    """Drop fillers at random, then shorten one, until all pieces together have at most `num_tokens` tokens.

    Nothing is dropped if shortening one filler is enough. Pieces that are no fillers stay whole, so the result is
    longer than `num_tokens` if they are.
    """
    kept = list(pieces)
    excess = total_length(kept) - num_tokens
    while excess > 0:
        fillers = [index for index, piece in enumerate(kept) if piece.role is Role.FILLER]
        if not fillers:
            break
        index = rng.choice([i for i in fillers if len(kept[i]) > excess] or fillers)
        piece = kept[index]
        kept[index : index + 1] = [_shortened(piece, excess)] if len(piece) > excess else []
        excess -= min(excess, len(piece))
    return kept


def _shortened(piece: Piece, by: int) -> Piece:
    """What is left may lack the answer to a further question, so it counts as evidence of none."""
    if piece.lead is None or by <= len(piece.ids):
        return Piece(piece.ids[: len(piece.ids) - by], piece.role, piece.lead)
    return Piece(piece.ids[:0], piece.role, piece.lead[: len(piece) - by])
