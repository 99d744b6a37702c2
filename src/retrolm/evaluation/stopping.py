"""Where an answer ends: while generating (to save time) and afterwards (what is scored)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tasks.sample import EvalSample


def stop_strings(sample: EvalSample) -> tuple[str, ...]:
    """Strings that end the answer; a line break where only the first line is scored."""
    stops = list(sample.extra.get("stop", []))
    return tuple(dict.fromkeys([*stops, "\n"] if sample.extra.get("first_line") else stops))


def cut_answer(text: str, stops: Sequence[str]) -> str:
    """The answer up to the first stop string; what stands before its first visible character doesn't stop it."""
    text = text.strip()
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].rstrip()


class StopAfter:
    """Generation criterion: a row is done once its answer holds a stop string.

    Called with input_ids int64 [B, T], prompt included, after each token; returns bool [B]. The engine says where each
    generation begins (`begin`); otherwise the first call of an object counts as the first token of its only one.

    Args:
        keep_spaces: let a stop string count before the first visible character too.
    """

    on_host = True  # texts are compared there, wherever the model runs

    def __init__(self, tokenizer: Any, stops: Sequence[str], keep_spaces: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._keep_spaces = keep_spaces
        self._width = 0

    def begin(self, num_prompt_tokens: int) -> None:
        """A generation behind prompts of so many tokens follows."""
        self._width = num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self._width = self._width or input_ids.shape[1] - 1
        texts = self._tokenizer.batch_decode(input_ids[:, self._width :], skip_special_tokens=True)
        texts = texts if self._keep_spaces else [text.lstrip() for text in texts]
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)
