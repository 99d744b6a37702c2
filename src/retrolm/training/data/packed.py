"""Questions over many passages: positives, hard negatives and fillers in random order, as in the paper."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .context import BuildContext
from .excerpt import Excerpt
from .frames import draw_frame
from .pieces import Piece, Role, drop_surplus
from .pool import QuestionRow
from .sample import Span, Stage1Sample
from .turns import Dialogue

CUT_SHARE = 0.8
DIALOGUE_SHARE = 0.08
SAME_SOURCE_SHARE = 0.5
_HEADINGS = ("", "", "", "Passage {n}:\n", "Document {n}\n", "[{n}] ", "### {n}\n", "Source {n}: ")
_GAPS = ("\n\n", "\n\n", "\n\n", "\n", "\n\n\n", "\n---\n")


@dataclass(frozen=True)
class PackingStyle:
    """How passages are set in one text: heading (with {n}), what stands between them, titles, as a conversation."""

    heading: str
    gap: str
    titles: bool
    dialogue: Dialogue | None

    @classmethod
    def draw(cls, rng: random.Random, titles_share: float, dialogue_share: float) -> PackingStyle:
        """Draw a style."""
        if rng.random() < dialogue_share:
            return cls("", "", False, Dialogue.draw(rng))
        return cls(rng.choice(_HEADINGS), rng.choice(_GAPS), rng.random() < titles_share, None)


def packed_sample(
    context: BuildContext, rows: Sequence[QuestionRow], question: str, source: str, num_tokens: int, rng: random.Random
) -> Stage1Sample:
    """Build a text of `num_tokens` that holds the evidence of all given questions, asked as one `question`."""
    config = context.config
    style = PackingStyle.draw(rng, config.titles, DIALOGUE_SHARE)
    return _pack(context, rows, question, source, num_tokens, style, rng)


def dialogue_sample(
    context: BuildContext,
    row: QuestionRow,
    question: str,
    speaker: str,
    source: str,
    num_tokens: int,
    rng: random.Random,
) -> Stage1Sample:
    """Build a conversation in which `speaker` says what the positive passage of a question says."""
    style = PackingStyle("", "", False, Dialogue.draw(rng, speaker))
    return _pack(context, [row], question, source, num_tokens, style, rng)


def _pack(
    context: BuildContext,
    rows: Sequence[QuestionRow],
    question: str,
    source: str,
    num_tokens: int,
    style: PackingStyle,
    rng: random.Random,
) -> Stage1Sample:
    frame = draw_frame(rng, context.config.paper_format)
    pieces = _evidence(context, rows, style, num_tokens, rng)
    pieces += _fillers(context, rows, style, context.room(frame, pieces, num_tokens), rng)
    lead = len(context.encoder.encode_repeated(style.gap + style.heading.format(n=1)))
    # What is left has to be cut a little, but nothing dropped, so that numbers run on. The first piece has no gap.
    pieces = drop_surplus(pieces, context.room(frame, (), num_tokens) + lead, rng, lead)
    rng.shuffle(pieces)
    return context.finish(frame, _headed(context, pieces, style), question, source, num_tokens, rng)


def _evidence(
    context: BuildContext, rows: Sequence[QuestionRow], style: PackingStyle, num_tokens: int, rng: random.Random
) -> list[Piece]:
    places = [(row, slot) for row in rows for slot in range(len(row.positives))]
    limit = min(context.config.max_passage_tokens, num_tokens // (2 * len(places)))
    seen: set[int] = set()
    pieces = []
    for row, slot in places:
        index = int(row.positives[slot])
        if index not in seen:
            seen.add(index)
            excerpt, focus = _without_quote(Excerpt.passage(context.pool, index), row, slot, rng)
            pieces.append(_set(context, index, excerpt.around(focus, limit, rng), style, Role.EVIDENCE, rng))
    return pieces


def _without_quote(excerpt: Excerpt, row: QuestionRow, slot: int, rng: random.Random) -> tuple[Excerpt, Span]:
    """Take the sentence that the question quotes out of its passage, most of the time; return the focus as well."""
    start, end = row.cut
    if slot == 0 and start >= 0:
        if rng.random() < CUT_SHARE and len(excerpt) > 2 * (end - start):
            return excerpt.without(row.cut), (start, start)
        return excerpt, row.cut
    return excerpt, (int(row.answers[slot][0]), int(row.answers[slot][1]))


def _set(
    context: BuildContext, index: int, excerpt: Excerpt, style: PackingStyle, role: Role, rng: random.Random
) -> Piece:
    """Set an excerpt of passage `index` in the sample's style: as turns of a conversation, or with its title."""
    if style.dialogue is not None:
        return Piece(style.dialogue.turns(context.encoder, excerpt, role is Role.EVIDENCE, rng), role)
    title = context.pool.title(index) if style.titles else excerpt.ids[:0]
    return Piece(np.concatenate([title, excerpt.ids]), role)


def _fillers(
    context: BuildContext, rows: Sequence[QuestionRow], style: PackingStyle, room: int, rng: random.Random
) -> list[Piece]:
    positives = {int(index) for row in rows for index in row.positives}
    pieces = []
    for index in _hard_negatives(context, rows, positives, rng):
        pieces.append(_filler(context, index, style, rng))
        room -= len(pieces[-1])
    if style.dialogue is None and rng.random() < context.config.book_padding:
        return pieces + [Piece(ids) for ids in context.prose_slices(rng, max(0, room))]
    for index in _random_passages(context, rows, positives, rng):
        if room <= 0:
            break
        pieces.append(_filler(context, index, style, rng))
        room -= len(pieces[-1])
    return pieces


def _hard_negatives(
    context: BuildContext, rows: Sequence[QuestionRow], positives: set[int], rng: random.Random
) -> list[int]:
    config = context.config
    wanted = rng.randint(config.min_hard_negatives, config.max_hard_negatives)
    candidates = sorted({int(index) for row in rows for index in row.negatives} - positives)
    return rng.sample(candidates, min(wanted, len(candidates)))


def _random_passages(
    context: BuildContext, rows: Sequence[QuestionRow], positives: set[int], rng: random.Random
) -> Iterator[int]:
    """Yield passages without end: from the first positive's own source half of the time, else from any source."""
    source = context.pool.arrays["passage_source"]
    own = next(group for group in context.passages_by_source if source[group[0]] == source[rows[0].positives[0]])
    while True:
        same = rng.random() < SAME_SOURCE_SHARE
        index = int(own[rng.randrange(len(own))]) if same else context.random_passage(rng)
        if index not in positives or len(positives) >= context.pool.num_passages:
            yield index


def _filler(context: BuildContext, index: int, style: PackingStyle, rng: random.Random) -> Piece:
    excerpt = Excerpt.passage(context.pool, index).anywhere(context.config.max_passage_tokens, rng)
    return _set(context, index, excerpt, style, Role.FILLER, rng)


def _headed(context: BuildContext, pieces: Sequence[Piece], style: PackingStyle) -> list[Piece]:
    """Give pieces, in their final order, the heading and the gap to the piece before as lead."""
    headed = []
    for number, piece in enumerate(pieces, start=1):
        gap = style.gap if number > 1 else ""
        lead = context.encoder.encode_repeated(gap + style.heading.format(n=number))
        headed.append(Piece(piece.ids, piece.role, lead))
    return headed
