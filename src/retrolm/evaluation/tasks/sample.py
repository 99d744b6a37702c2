"""One question of a benchmark, ready for any model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EvalSample:
    """A document, a question about it, and what counts as the answer.

    Attributes:
        sample_id: unique inside the task and length, stable over runs.
        task: full name of the task, such as "ruler/niah_single_1".
        length: tokens the sample was made or cut for; `None` = natural length.
        context: everything in front of the question, with the prompt's opening words.
        question: everything behind the context, with its leading line breaks and instructions. `context + question`
            is exactly the benchmark's prompt.
        answers: accepted answers, or all parts of the answer (RULER), in the task's own order.
        max_new_tokens: the benchmark's limit on generated tokens.
        answer_prefix: text that opens the model's own turn and that it continues (RULER); stands behind the chat
            template's tail.
        chat: whether context and question go into the chat template as one user turn.
        extra: further facts: "gold_spans" (character ranges of the evidence in `context`), "all_classes", "stop"
            (strings that end the answer), "first_line" (only the first non-empty line is scored), "num_tokens" (of the
            rendered prompt), "source" and the like. JSON values only.
    """

    sample_id: str
    task: str
    length: int | None
    context: str
    question: str
    answers: list[str]
    max_new_tokens: int
    answer_prefix: str = ""
    chat: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The benchmark's text without any chat template."""
        return self.context + self.question + self.answer_prefix

    @property
    def gold_spans(self) -> list[tuple[int, int]]:
        """Character ranges of the evidence in `context`, half open; empty where unknown."""
        return [(start, end) for start, end in self.extra.get("gold_spans", [])]

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` turns back into an equal sample."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EvalSample:
        """Inverse of `to_json`."""
        return cls(**values)
