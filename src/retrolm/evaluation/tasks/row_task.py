"""Tasks whose samples are the rows of an official file."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .files import read_rows
from .prompt import Tokenizer
from .sample import EvalSample
from .task import Task, choose


@dataclass(frozen=True)
class RowTask(Task):
    """A task over one file. `length` is the most tokens of a prompt: a longer one loses its middle.

    Attributes:
        fields: what every row has.
    """

    fields: ClassVar[tuple[str, ...]]

    @abstractmethod
    def file(self, data_dir: Path | str | None) -> Path:
        """Where the rows lie; raises `UserError` with how to get them."""

    @abstractmethod
    def sample(self, tokenizer: Tokenizer, row: dict[str, Any], length: int | None) -> EvalSample:
        """One row as a sample."""

    def samples(
        self,
        tokenizer: Tokenizer,
        length: int | None = None,
        num_samples: int | None = None,
        seed: int = 42,
        data_dir: Path | str | None = None,
        cache_dir: Path | str | None = None,
    ) -> list[EvalSample]:
        """See `Task.samples`."""
        rows = read_rows(self.file(data_dir), self.fields)
        return [self.sample(tokenizer, row, length) for row in choose(rows, num_samples, seed)]
