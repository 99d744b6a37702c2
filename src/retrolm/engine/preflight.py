"""Refuses questions that can't be answered before the text is read, which may take minutes."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from .model import RetroLM


def check_questions(lm: RetroLM, num_text_tokens: int, questions: Sequence[str]) -> None:
    """Raise `UserError` for an empty question, or one that leaves no room for a text of that many tokens."""
    for question in questions:
        lm.program.require_room(num_text_tokens, lm.question_ids(question))


def count_tokens(lm: RetroLM, text: str) -> int:
    """Tokens of `text` as it is read, the chat template's head left out; raises `UserError` without a tokenizer."""
    if lm.format is None:
        raise UserError("This model has no tokenizer, which reading text needs.")
    return len(lm.format.encode(text))
