"""Questions over coherent prose without a language model: quoted sentences, cloze questions and keywords.

The text is consecutive book prose, so that a page's neighbours are on the same subject: the retriever has to tell
pages of one book apart, not passages of different ones.
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np

from .context import BuildContext
from .frames import draw_frame
from .passage_queries import MIN_SALIENT_WORDS, cloze_question, salient_words
from .pieces import Piece, Role
from .sample import Span, Stage1Sample, TokenArray

_MIN_TOKENS, _MAX_TOKENS = 10, 70
_NEAR_TOKENS = 48
_ATTEMPTS = 40
_QUOTES = (
    "{quote}",
    '"{quote}"',
    'Where is this sentence: "{quote}"?',
    'Find the place that reads: "{quote}"',
    'What comes right after "{quote}"?',
    'What is happening when we read "{quote}"?',
)
_MISSING = (
    "{quote}",
    'Which place would this sentence belong to: "{quote}"?',
    'This sentence is missing. Where was it? "{quote}"',
    "What is going on around the point where {quote}",
)
_KEYWORDS = (
    "What is said of {words}?",
    "Which part deals with {words}?",
    "{words}",
    "Find where {words} come together.",
    "What happens with {words}?",
    "Tell me more about {words}.",
)


def quoted_sample(context: BuildContext, source: str, num_tokens: int, rng: random.Random) -> Stage1Sample:
    """Build a text of `num_tokens` of book prose and a question for one sentence of it.

    Evidence is the sentence, or its surroundings if the sentence has been taken out.
    """
    frame = draw_frame(rng, context.config.paper_format)
    room = context.room(frame, (), num_tokens)
    ids, starts = context.prose(rng, room + _MAX_TOKENS)
    span, sentence = _telling_sentence(context, ids[:room], starts, rng)
    ask = rng.choices((_quote, _without_quote, _cloze, _keywords), weights=(2, 3, 3, 2))[0]
    question, pieces = ask(context, ids, span, sentence, room, rng)
    return context.finish(frame, pieces, question, source, num_tokens, rng)


def _telling_sentence(
    context: BuildContext, ids: TokenArray, starts: list[int], rng: random.Random
) -> tuple[Span, str]:
    """Draw a sentence with at least three uncommon words; settles for any after 40 draws."""
    bounds = [(s, e) for s, e in pairwise(starts) if e <= len(ids)]
    fitting = [(s, e) for s, e in bounds if _MIN_TOKENS <= e - s <= _MAX_TOKENS] or [(0, min(len(ids), _MAX_TOKENS))]
    for _ in range(_ATTEMPTS):
        start, end = rng.choice(fitting)
        sentence = " ".join(context.encoder.decode(ids[start:end]).split())
        if len(salient_words(sentence, context.pool.common_words)) >= MIN_SALIENT_WORDS:
            break
    return (start, end), sentence


_Asked = tuple[str, list[Piece]]


def _quote(context: BuildContext, ids: TokenArray, span: Span, sentence: str, room: int, rng: random.Random) -> _Asked:
    return rng.choice(_QUOTES).format(quote=sentence), _marked(ids[:room], span)


def _without_quote(
    context: BuildContext, ids: TokenArray, span: Span, sentence: str, room: int, rng: random.Random
) -> _Asked:
    start, end = span
    before, after = max(0, start - _NEAR_TOKENS), min(len(ids), end + _NEAR_TOKENS)
    around = np.concatenate([ids[before:start], ids[end:after]])
    pieces = [Piece(ids[:before]), Piece(around, Role.EVIDENCE), Piece(ids[after : room + end - start])]
    return rng.choice(_MISSING).format(quote=sentence), pieces


def _cloze(context: BuildContext, ids: TokenArray, span: Span, sentence: str, room: int, rng: random.Random) -> _Asked:
    question = cloze_question(sentence, context.pool.common_words, rng)
    return question or sentence, _marked(ids[:room], span)


def _keywords(
    context: BuildContext, ids: TokenArray, span: Span, sentence: str, room: int, rng: random.Random
) -> _Asked:
    words = [match.group() for match in salient_words(sentence, context.pool.common_words)] or sentence.split()
    chosen = rng.sample(words, min(len(words), rng.randint(2, 4)))
    listed = ", ".join(chosen[:-1]) + f" and {chosen[-1]}" if len(chosen) > 1 else chosen[0]
    return rng.choice(_KEYWORDS).format(words=listed), _marked(ids[:room], span)


def _marked(ids: TokenArray, span: Span) -> list[Piece]:
    start, end = span
    return [Piece(ids[:start]), Piece(ids[start:end], Role.EVIDENCE), Piece(ids[end:])]
