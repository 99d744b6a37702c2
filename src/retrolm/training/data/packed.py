"""Questions over many passages: positives, hard negatives and fillers in random order, as in the paper."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .context import Asked, BuildContext
from .excerpt import Excerpt
from .frames import draw_frame
from .pieces import Piece, Role, drop_surplus
from .pool import QuestionRow
from .sample import Span, Stage1Sample
from .turns import Dialogue

CUT_SHARE = 0.8
DIALOGUE_SHARE = 0.08
SAME_SOURCE_SHARE = 0.5
FURTHER_NEGATIVES = (2, 6)
TOKENS_PER_DRAWN = 2000  # a question drawn for the text, with its evidence and hard negatives, takes about half of it
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
    asking = Asking(context, {int(index) for row in rows for index in row.positives}, num_tokens)
    pieces += _further(context, asking, style, context.room(frame, pieces, num_tokens), rng)
    pieces += _fillers(context, rows, asking, style, context.room(frame, pieces, num_tokens), rng)
    lead = len(context.encoder.encode_repeated(style.gap + style.heading.format(n=1)))
    # What is left has to be cut a little, but nothing dropped, so that numbers run on. The first piece has no gap.
    pieces = drop_surplus(pieces, context.room(frame, (), num_tokens) + lead, rng, lead)
    rng.shuffle(pieces)
    headed = _headed(context, pieces, style)
    return context.finish(frame, headed, question, source, num_tokens, rng, further=asking.questions)


class Asking:
    """The further questions of one text (`further_questions` at most).

    Half of them, but no more than the text has room for, are drawn like the text's own question and come with hard
    negatives; the others ask for what passages say that stand there anyway.

    Attributes:
        taken: passages that answer a question of the text. questions: those asked so far. num_drawn: see above.
    """

    def __init__(self, context: BuildContext, taken: set[int], num_tokens: int) -> None:
        self._context = context
        self._most = context.config.further_questions
        self.taken = taken
        self.questions: list[Asked] = []
        self.num_drawn = min(-(-self._most // 2), num_tokens // TOKENS_PER_DRAWN)

    @property
    def is_over(self) -> bool:
        return len(self.questions) >= self._most

    def add(self, row: QuestionRow, rng: random.Random) -> int:
        """Ask a row's question; returns its number."""
        self.taken.add(int(row.positives[0]))
        self.questions.append((self._context.wording(row, rng), ""))
        return len(self.questions) - 1


def _further(context: BuildContext, asking: Asking, style: PackingStyle, room: int, rng: random.Random) -> list[Piece]:
    """Evidence and hard negatives of questions that are drawn for this text."""
    pieces: list[Piece] = []
    for _ in range(asking.num_drawn):
        row = context.random_row(rng)
        if row is None or int(row.positives[0]) in asking.taken:
            continue
        number = asking.add(row, rng)
        pieces.append(_answering(context, row, number, Role.FIRM, style, rng))
        negatives = sorted({int(index) for index in row.negatives} - asking.taken)
        few = rng.sample(negatives, min(rng.randint(*FURTHER_NEGATIVES), len(negatives)))
        pieces += [_filler(context, index, style, rng) for index in few]
        if sum(map(len, pieces)) > room // 2:
            break
    return pieces


def _answering(
    context: BuildContext, row: QuestionRow, number: int, role: Role, style: PackingStyle, rng: random.Random
) -> Piece:
    """The passage that answers further question `number`, cut around the answer."""
    index = int(row.positives[0])
    excerpt, focus = _without_quote(Excerpt.passage(context.pool, index), row, 0, rng)
    piece = _set(context, index, excerpt.around(focus, context.config.max_passage_tokens, rng), style, role, rng)
    return replace(piece, further=number)


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
    context: BuildContext,
    rows: Sequence[QuestionRow],
    asking: Asking,
    style: PackingStyle,
    room: int,
    rng: random.Random,
) -> list[Piece]:
    pieces = []
    for index in _hard_negatives(context, rows, asking.taken, rng):
        pieces.append(_filler(context, index, style, rng))
        room -= len(pieces[-1])
    if style.dialogue is None and rng.random() < context.config.book_padding:
        return pieces + [Piece(ids) for ids in context.prose_slices(rng, max(0, room))]
    for index in _random_passages(context, rows, asking.taken, rng):
        if room <= 0:
            break
        row = None if asking.is_over else context.row_on(index, rng)
        if row is None:
            pieces.append(_filler(context, index, style, rng))
        else:
            pieces.append(_answering(context, row, asking.add(row, rng), Role.FILLER, style, rng))
        room -= len(pieces[-1])
    return pieces


def _hard_negatives(
    context: BuildContext, rows: Sequence[QuestionRow], taken: set[int], rng: random.Random
) -> list[int]:
    config = context.config
    wanted = rng.randint(config.min_hard_negatives, config.max_hard_negatives)
    candidates = sorted({int(index) for row in rows for index in row.negatives} - taken)
    return rng.sample(candidates, min(wanted, len(candidates)))


def _random_passages(
    context: BuildContext, rows: Sequence[QuestionRow], taken: set[int], rng: random.Random
) -> Iterator[int]:
    """Yield passages without end, none that is `taken` while there are others.

    From the first positive's own source half of the time, else from any source.
    """
    source = context.pool.arrays["passage_source"]
    own = next(group for group in context.passages_by_source if source[group[0]] == source[rows[0].positives[0]])
    while True:
        same = rng.random() < SAME_SOURCE_SHARE
        index = int(own[rng.randrange(len(own))]) if same else context.random_passage(rng)
        if index not in taken or len(taken) >= context.pool.num_passages:
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
        headed.append(replace(piece, lead=lead))
    return headed
