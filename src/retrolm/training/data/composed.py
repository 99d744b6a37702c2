"""Two questions in one: the pages that answer either are evidence, as in questions over several documents."""

from __future__ import annotations

import random

from .context import BuildContext
from .packed import packed_sample
from .sample import Stage1Sample

_FORMS = (
    "{a} And {b}",
    "{a} Also, {b}",
    "First, {a} Second, {b}",
    "I have two questions. {a} {b}",
    "{a}\n{b}",
    "Compare the answers: {a} {b}",
)


def composed_sample(context: BuildContext, source: str, num_tokens: int, rng: random.Random) -> Stage1Sample:
    """Build a text of `num_tokens` with the evidence of two questions of one source, asked together."""
    pool = context.pool
    rows_by_source = context.natural_rows
    rows = rows_by_source[rng.randrange(len(rows_by_source))]
    drawn = [pool.row(int(rows[rng.randrange(len(rows))])) for _ in range(2)]
    question = rng.choice(_FORMS).format(a=_asked(drawn[0].query), b=_asked(drawn[1].query))
    return packed_sample(context, drawn, question, source, num_tokens, rng)


def _asked(query: str) -> str:
    return query if query.rstrip().endswith(("?", ".", "!")) else f"{query.rstrip()}?"
