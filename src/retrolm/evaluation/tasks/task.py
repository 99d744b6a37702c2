"""What every task offers to the runner."""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ...errors import UserError, unknown
from .prompt import Tokenizer
from .sample import EvalSample

T = TypeVar("T")


@dataclass(frozen=True)
class Task(ABC):
    """A benchmark task: makes or loads samples and scores predictions.

    Attributes:
        name: full name, "family/task".
        max_new_tokens: the benchmark's limit on generated tokens.
        metric: name of the score, for tables.
        chat: whether prompts go into the model's chat template as one user turn.
        options: names of the fields that `get_task` lets a user set.
    """

    name: str
    max_new_tokens: int
    metric: str
    chat: bool = True
    options: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def samples(
        self,
        tokenizer: Tokenizer,
        length: int | None = None,
        num_samples: int | None = None,
        seed: int = 42,
        data_dir: Path | str | None = None,
        cache_dir: Path | str | None = None,
    ) -> list[EvalSample]:
        """Return the task's samples, the same for equal arguments.

        Args:
            tokenizer: of the model to be asked; lengths are counted with it.
            length: tokens of the whole prompt: what generated and packed tasks fill, and to what the others cut a
                longer text in its middle. `None` = natural length, which generated tasks refuse.
            num_samples: at most this many (a random choice by `seed` where there are more); `None` = all.
            seed: of everything random.
            data_dir: folder with the data sets, or "hub" for those on the Hugging Face hub.
            cache_dir: folder where generated samples are kept.

        Raises `UserError` for a length that can't be made, and for missing data with how to get it.
        """

    @abstractmethod
    def score(self, prediction: str, sample: EvalSample) -> float:
        """Score of one prediction between 0 and 1; reports multiply means by 100."""

    def extra_scores(self, prediction: str, sample: EvalSample) -> dict[str, float]:
        """Further scores worth reporting beside the main one, by name, between 0 and 1."""
        return {}

    def with_options(self: TaskT, options: dict[str, Any]) -> TaskT:
        """Return a copy with some options set; an unknown name raises `UserError` with the closest one."""
        for key in options:
            if key not in self.options:
                if not self.options:
                    raise UserError(f"Task {self.name!r} has no options, got {key!r}.")
                raise unknown(f"option of {self.name!r}", key, self.options)
        return dataclasses.replace(self, **options)


TaskT = TypeVar("TaskT", bound=Task)


def choose(rows: Sequence[T], num_samples: int | None, seed: int) -> list[T]:
    """Pick at most `num_samples` rows at random and keep their order; a larger number picks the same and more."""
    check_num_samples(num_samples)
    if num_samples is None or num_samples >= len(rows):
        return list(rows)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[index] for index in sorted(order[:num_samples])]


def check_num_samples(num_samples: int | None) -> None:
    """Refuse a number of samples under 1; raises `UserError`."""
    if num_samples is not None and num_samples < 1:
        raise UserError(f"num_samples must be at least 1 or None, got {num_samples}.")
