"""One needle asked for among eight: RULER's multi-key task with twice its keys, for comparisons of our own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...errors import UserError
from .generator import Generator
from .prompt import Tokenizer
from .ruler.haystack import load_essay
from .ruler.needles import NEEDLE_TASKS, NeedleGenerator
from .ruler.task import MAX_NEW_TOKENS, RulerTask

BASE = "niah_multikey_1"


@dataclass(frozen=True)
class ManyKeysTask(RulerTask):
    """Essays with `num_keys` needles of different keys; the prompt asks for one of them."""

    num_keys: int = 8
    options: ClassVar[tuple[str, ...]] = ("essays",)

    def generator(self, tokenizer: Tokenizer, length: int | None, seed: int, data_dir: Path | str | None) -> Generator:
        """See `GeneratedTask.generator`; `length` must be given."""
        if length is None:
            raise UserError(f"{self.name} is generated to a length: ask for one in tokens, such as 4096.")
        config = dataclasses.replace(NEEDLE_TASKS[BASE], num_keys=self.num_keys)
        return NeedleGenerator(config, length, load_essay(self.essays, data_dir, length))


def many_keys_tasks() -> list[ManyKeysTask]:
    """`needles/one_of_eight`."""
    return [ManyKeysTask("needles/one_of_eight", MAX_NEW_TOKENS[BASE], "string_match_all")]
