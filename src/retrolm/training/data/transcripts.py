"""Questions over pseudo-transcripts: passages spoken by people, asked for by speaker and topic."""

from __future__ import annotations

import random

from .context import BuildContext
from .packed import dialogue_sample
from .sample import Stage1Sample
from .turns import draw_speakers, speaker_topic_question

_NATURAL_SHARE = 0.3


def transcript_sample(context: BuildContext, source: str, num_tokens: int, rng: random.Random) -> Stage1Sample:
    """Build a conversation of `num_tokens` in which one speaker says what a passage says, and ask for that.

    The topic is two or three keywords of the passage; now and then a natural question of the passage is asked instead.
    """
    speaker = draw_speakers(rng)[0]
    if rng.random() < _NATURAL_SHARE and context.natural_rows:
        rows = context.natural_rows[rng.randrange(len(context.natural_rows))]
        row = context.pool.row(int(rows[rng.randrange(len(rows))]))
        return dialogue_sample(context, row, row.query, speaker, source, num_tokens, rng)
    rows = context.keyword_rows
    row = context.pool.row(int(rows[rng.randrange(len(rows))]))
    topic = " and ".join(row.query.split(", ")[:3])
    return dialogue_sample(context, row, speaker_topic_question(rng, speaker, topic), speaker, source, num_tokens, rng)
