"""Prompts that come as one string, with nothing said about where a question begins (as other harnesses send them).

The last `page_size` tokens act as the question page, all before them as the document; its first page is the sink.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..engine.model import RetroLM
from ..engine.prompts import prompt_format
from ..engine.stock import stock_answers
from ..errors import UserError
from .readers import GREEDY
from .stopping import StopAfter


class PlainPrompts:
    """Greedy continuations and log-likelihoods of plain prompts by one engine.

    Args:
        full: dense attention by the stock model instead of the engine's method.
    """

    def __init__(self, lm: RetroLM, full: bool = False) -> None:
        self._lm = lm
        self._full = full
        self._plain = prompt_format(lm.tokenizer, chat=False)
        lm.format = dataclasses.replace(self._plain, prefix_ids=())

    def ids(self, text: str) -> list[int]:
        """Token ids of a prompt, with BOS in front where the tokenizer wants one and the text has none."""
        ids = self._plain.encode(text)
        head = list(self._plain.prefix_ids)
        return ids if ids[: len(head)] == head else head + ids

    def continue_all(self, prompts: Sequence[str], max_new_tokens: int, stops: Sequence[str] = ()) -> list[str]:
        """Continue prompts side by side, each up to its first stop string (which is left out).

        Raises `UserError` for a prompt of fewer than two tokens.
        """
        rows = [self.ids(prompt) for prompt in prompts]
        if min(map(len, rows)) < 2:
            raise UserError("A prompt of fewer than two tokens can't be continued. Give a longer one.")
        options = {"max_new_tokens": max_new_tokens, **GREEDY}
        if stops:
            options["stopping_criteria"] = [StopAfter(self._lm.tokenizer, stops, keep_spaces=True)]
        tokens = self._stock(rows, options) if self._full else self._paged(rows, options)
        texts = self._lm.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [cut_at(text, stops) for text in texts]

    def _stock(self, rows: list[list[int]], options: dict[str, object]) -> list[list[int]]:
        return [list(answer.token_ids) for answer in stock_answers(self._lm, rows, **options)]  # type: ignore[arg-type]

    def _paged(self, rows: list[list[int]], options: dict[str, object]) -> list[list[int]]:
        sizes = [min(self._lm.config.page_size, len(ids) - 1) for ids in rows]
        documents = self._lm.read([ids[:-size] for ids, size in zip(rows, sizes, strict=True)])
        questions = [ids[-size:] for ids, size in zip(rows, sizes, strict=True)]
        try:
            answers = self._lm.ask_batch(list(zip(documents, questions, strict=True)), **options)  # type: ignore[arg-type]
        finally:
            for document in documents:
                document.close()
        return [list(answer.token_ids) for answer in answers]

    def log_likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-probability of a continuation, and whether it is the greedy one.

        Spaces at the context's end count to the continuation, whose tokens are those of the joined text.
        """
        kept = context.rstrip(" ")
        start = len(self.ids(kept)) if kept else 0
        return self._score(self.ids(context + continuation), start)

    def log_likelihood_rolling(self, text: str) -> float:
        """Log-probability of a whole text but for its first token (BOS where the tokenizer has one)."""
        return self._score(self.ids(text), 1)[0]

    @torch.no_grad()
    def _score(self, ids: list[int], start: int) -> tuple[float, bool]:
        """Sum of log-probabilities of `ids[start:]`; a token without any before it is taken after EOS."""
        if start == 0:
            ids, start = [self._lm.eos_ids[0], *ids], 1
        inputs = torch.tensor(ids, device=self._lm.device)
        logits = self._lm.model(inputs[None]).logits[0] if self._full else self._lm.logits(inputs)
        scores = logits[start - 1 : -1].float().log_softmax(-1)
        targets = inputs[start:].to(scores.device)
        greedy = bool((scores.argmax(-1) == targets).all())
        return float(scores.gather(1, targets[:, None]).sum()), greedy


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string, spaces and line breaks kept."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
