"""Where generated rows stop: criteria as transformers' `generate` asks them, in the engine's own loop too.

Beyond what transformers wants of a criterion, one may have a method `begin(num_prompt_tokens)`, called before it is
first asked in each generation, and an attribute `on_host`: true if the ids it is asked about may be on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StopStringCriteria

from ..errors import UserError

Placed = Callable[[Any, Tensor], Tensor]


class StopNote(StoppingCriteria):
    """Asks the user's criteria in order, and notes where each row stopped; one object per generation.

    Args:
        placed: given a criterion and the ids, the ids as that criterion is to see them.

    Attributes:
        lengths: tokens of each row, prompt included, when a criterion first held; 0 where none did.
    """

    def __init__(self, criteria: list[Any], placed: Placed = lambda criterion, input_ids: input_ids) -> None:
        self._criteria = criteria
        self._placed = placed
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows, length = input_ids.shape
        if not self.lengths:
            self._begin(rows, length - 1)
        done = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        for criterion in self._criteria:
            found = criterion(self._placed(criterion, input_ids), scores, **kwargs)
            done |= torch.as_tensor(found, device=done.device)
        self.lengths = [at or length * held for at, held in zip(self.lengths, done.tolist(), strict=True)]
        return done

    def stops(self, rows: int, width: int) -> list[int]:
        """Tokens behind a prompt of `width` tokens when a criterion first held, for each row; 0 where none did."""
        return [max(at - width, 0) for at in self.lengths] or [0] * rows

    def _begin(self, rows: int, width: int) -> None:
        self.lengths = [0] * rows
        for criterion in self._criteria:
            if hasattr(criterion, "begin"):
                criterion.begin(width)


class StopWhen(StoppingCriteria):
    """Stops all rows once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


class StopStrings(StopStringCriteria):
    """Transformers' criterion for the option `stop_strings`; it works where the ids are."""

    on_host = True


def stop_strings(tokenizer: Any, strings: str | list[str]) -> StopStrings:
    """The criterion of the option `stop_strings`; raises `UserError` where there is no tokenizer."""
    if tokenizer is None:
        raise UserError("The generation option 'stop_strings' needs a tokenizer. Pass one to RetroLM.")
    return StopStrings(tokenizer, strings)
