"""Key-value facts planted in long texts: 1 to `max_keys` keys of one wording, one or a few of them asked for."""

from __future__ import annotations

import random

from .context import BuildContext
from .fact_wordings import draw_wording
from .frames import draw_frame
from .haystacks import hide
from .quizzes import draw_quiz, together
from .sample import Stage1Sample

_HAYSTACKS = ("prose", "passages", "filler")
_HAYSTACK_WEIGHTS = (60, 20, 20)
_TOKENS_PER_KEY = 100  # at least: a text is mostly haystack


def facts_sample(context: BuildContext, source: str, num_tokens: int, rng: random.Random) -> Stage1Sample:
    """Build a text of `num_tokens` with planted facts and a question for one key (or a few, or for a value's key).

    It takes one kind of facts or, as often, several: then the wording is needed as well to find the one asked for.
    """
    frame = draw_frame(rng, context.config.paper_format)
    haystack = rng.choices(_HAYSTACKS, weights=_HAYSTACK_WEIGHTS)[0]
    most = context.config.further_questions
    most_keys = min(context.config.max_keys, max(1, num_tokens // _TOKENS_PER_KEY))
    count = rng.choice((1, rng.randint(2, 6))) if most else 1
    quizzes = [
        draw_quiz(rng, draw_wording(rng, context.split), _num_keys(rng, most_keys), most, context.split, count > 1)
        for _ in range(count)
    ]
    quiz = together(rng, quizzes, most)
    pieces = hide(context, frame, quiz.statements, quiz.is_evidence, haystack, num_tokens, rng, quiz.answers)
    return context.finish(frame, pieces, quiz.question, source, num_tokens, rng, quiz.answer_prefix, quiz.further)


def _num_keys(rng: random.Random, most: int) -> int:
    """Draw 1 key, a few or many, so that single facts and crowded texts are equally frequent."""
    few_or_many = rng.randint(2, 4), rng.randint(4, 8), rng.randint(8, 16), rng.randint(16, 64)
    return min(most, rng.choice((1, 1, *few_or_many)))
