"""The RULER tasks as the runner sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ....errors import UserError
from ....metrics import clean_prediction, string_match_all, string_match_part
from ..generated import GeneratedTask
from ..generator import Generator
from ..prompt import Tokenizer
from ..sample import EvalSample
from .documents import DocumentGenerator, load_hotpot, load_squad
from .frequent import CodedWordsGenerator, CommonWordsGenerator
from .haystack import load_essay
from .needles import NEEDLE_TASKS, NeedleGenerator
from .tracking import TrackingGenerator

MAX_NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32} | dict.fromkeys(NEEDLE_TASKS, 128)
METRICS: dict[str, Callable[[str, list[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}


@dataclass(frozen=True)
class RulerTask(GeneratedTask):
    """One RULER task; it has 500 samples, or as many as the qa file has questions.

    Attributes:
        essays: file or folder of running text for the essay haystack; `None` = the data folder's.
        squad_file: SQuAD-format file for qa_1; `None` = the data folder's.
        hotpot_file: HotpotQA distractor file for qa_2; `None` = the data folder's.
    """

    default_samples: int | None = 500
    essays: Path | str | None = None
    squad_file: Path | str | None = None
    hotpot_file: Path | str | None = None
    options: ClassVar[tuple[str, ...]] = ("essays", "squad_file", "hotpot_file")

    def generator(self, tokenizer: Tokenizer, length: int | None, seed: int, data_dir: Path | str | None) -> Generator:
        """See `GeneratedTask.generator`; `length` must be given."""
        if length is None:
            raise UserError(f"{self.name} is generated to a length: ask for one in tokens, such as 4096.")
        task = self.name.removeprefix("ruler/")
        if task in NEEDLE_TASKS:
            config = NEEDLE_TASKS[task]
            essay = load_essay(self.essays, data_dir, length) if config.haystack == "essay" else None
            return NeedleGenerator(config, length, essay)
        if task == "qa_1":
            return DocumentGenerator(load_squad(self.squad_file, data_dir))
        if task == "qa_2":
            return DocumentGenerator(load_hotpot(self.hotpot_file, data_dir))
        if task == "vt":
            return TrackingGenerator(tokenizer, self.max_new_tokens)
        return CommonWordsGenerator(length) if task == "cwe" else CodedWordsGenerator(length)

    def score(self, prediction: str, sample: EvalSample) -> float:
        """Share of the references in the prediction (any of them for qa), upper and lower case alike."""
        return METRICS[self.metric](clean_prediction(prediction), sample.answers)


def ruler_tasks() -> list[RulerTask]:
    """All 13 tasks in the benchmark's order."""
    return [
        RulerTask(f"ruler/{task}", MAX_NEW_TOKENS[task], _metric(task))
        for task in (*NEEDLE_TASKS, "vt", "cwe", "fwe", "qa_1", "qa_2")
    ]


def _metric(task: str) -> str:
    return "string_match_part" if task.startswith("qa") else "string_match_all"
