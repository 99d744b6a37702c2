"""Answers over a shortened prompt: the same ids around the text, of the text only its best chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..asked_words import query_of
from ..engine.answer_dense import DenseProgram
from ..engine.answering import PROGRAMS, Prompt
from ..engine.results import Answer
from ..errors import UserError
from .chunks import best_first, chunk_spans, that_fit
from .method import RagMethod


@PROGRAMS.register("rag")
class RagProgram(DenseProgram):
    """Cuts the document, asks the method which chunks fit the question, and lets the stock model answer from them."""

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any) -> list[Answer]:
        return super().answer([self.shortened(prompt) for prompt in prompts], max_new_tokens, **options)

    def logits(self, input_ids: Tensor) -> Tensor:
        """A text alone says nothing of what is asked; raises `UserError`."""
        raise UserError(f"{self.lm.method.name} shortens a prompt for a question and has no logits of a text alone.")

    def shortened(self, prompt: Prompt) -> Prompt:
        """The prompt with only the chosen chunks of its document.

        Raises `UserError` where not a single chunk fits the budget beside the rest of the prompt.
        """
        method, budget = self.lm.method, self.lm.config.kv_budget
        assert isinstance(method, RagMethod)
        knobs, spans = method.knobs, chunk_spans(len(prompt.document), method.knobs.chunk_tokens)
        chosen = that_fit(
            spans,
            self._ranked(method, prompt, spans),
            knobs.num_chunks,
            budget - len(prompt.prefix) - len(prompt.question),
        )
        if spans and not chosen:
            raise UserError(
                f"kv_budget={budget} holds no chunk of {knobs.chunk_tokens} tokens beside {len(prompt.prefix)} tokens "
                f"before the text and {len(prompt.question)} of the question. Raise kv_budget, or lower chunk_tokens."
            )
        if knobs.order == "document":
            chosen = sorted(chosen)
        ids = [token for index in chosen for token in prompt.document[slice(*spans[index])]]
        return dataclasses.replace(prompt, document=tuple(ids), context_text=None)

    def _ranked(self, method: RagMethod, prompt: Prompt, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Chunks from best to worst; the first of the text before all if it must stay."""
        if self.lm.tokenizer is None:
            raise UserError(f"{method.name} looks at words and needs a tokenizer. Pass one to RetroLM.")
        if not spans:
            return []
        decode = self.lm.tokenizer.decode
        chunks = [decode(list(prompt.document[slice(*span)]), skip_special_tokens=True) for span in spans]
        asked = prompt.question_text or decode(list(prompt.question), skip_special_tokens=True)
        ranked = best_first(method.scores(query_of(asked), chunks, self.lm.device))
        return [0, *(index for index in ranked if index)] if method.knobs.keep_first else ranked
