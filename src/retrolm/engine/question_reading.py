"""What layers compute for questions alone, before their prompts are read: for methods that look for what is asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..methods.token_base import ChunkView, Part, QuestionQueries, TokenMethod
from .attachment import Attachment
from .backbone import Backbone
from .token_stream import TokenStream, read_prompts


class _Listener(TokenMethod):
    """Attends everything, and keeps the queries of layers that choose. Not a method to pick."""

    name = "question reader"
    true_positions = True

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[int, QuestionQueries] = {}

    def select(self, view: ChunkView) -> list[Part] | None:
        here, before = QuestionQueries(view.q_BHQD, view.true_BQ >= 0), self.heard.get(view.layer)
        if before is not None:
            queries = torch.cat([before.q_BHQD, here.q_BHQD], 2)
            here = QuestionQueries(queries, torch.cat([before.there_BQ, here.there_BQ], 1))
        self.heard[view.layer] = here
        return None


def read_questions(
    backbone: Backbone, attachment: Attachment, questions: Sequence[Sequence[int]], pad_id: int
) -> dict[int, QuestionQueries]:
    """Read questions densely, each as a text of its own; what each layer that chooses computed for them."""
    listener, longest = _Listener(), max(map(len, questions))
    if not longest:
        return {}
    stream = TokenStream(backbone, listener, longest, len(questions))
    stream.require_positions(longest)
    with attachment.run(stream):
        read_prompts(backbone, stream, questions, pad_id)
    return listener.heard
