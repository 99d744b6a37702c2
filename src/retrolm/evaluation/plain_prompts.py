"""Prompts that come as one string, with nothing said about where a question begins (as other harnesses send them).

The last `page_size` tokens act as the question page, all before them as the document; its first page is the sink.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..engine.answering import Prompt
from ..engine.model import RetroLM
from ..engine.prompts import prompt_format
from ..errors import UserError
from .readers import GREEDY
from .stopping import StopAfter


class PlainPrompts:
    """Greedy continuations and log-likelihoods of plain prompts by one engine."""

    def __init__(self, lm: RetroLM) -> None:
        self._lm = lm
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
        answers = self._lm.answer([self._prompt(ids) for ids in rows], **options)
        tokens = [list(answer.token_ids) for answer in answers]
        texts = self._lm.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [cut_at(text, stops) for text in texts]

    def _prompt(self, ids: list[int]) -> Prompt:
        size = min(self._lm.config.page_size, len(ids) - 1)
        return Prompt((), tuple(ids[:-size]), tuple(ids[-size:]))

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
        logits = self._lm.logits(inputs)
        scores = logits[start - 1 : -1].float().log_softmax(-1)
        targets = inputs[start:].to(scores.device)
        greedy = bool((scores.argmax(-1) == targets).all())
        return float(scores.gather(1, targets[:, None]).sum()), greedy


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string, spaces and line breaks kept."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
