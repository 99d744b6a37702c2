"""The RULER tasks as the runner sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ....errors import UserError
from ....metrics import clean_prediction, string_match_all, string_match_part
from ..cache import cached
from ..prompt import Tokenizer, fingerprint
from ..sample import EvalSample
from ..task import Task, check_num_samples
from .documents import DocumentGenerator, load_hotpot, load_squad
from .draft import Generator
from .fit import Fitter
from .frequent import CodedWordsGenerator, CommonWordsGenerator
from .haystack import load_essay
from .needles import NEEDLE_TASKS, NeedleGenerator
from .tracking import TrackingGenerator

FORMAT = 1
DEFAULT_SAMPLES = 500
MAX_NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32} | dict.fromkeys(NEEDLE_TASKS, 128)
METRICS: dict[str, Callable[[str, list[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}


@dataclass(frozen=True)
class RulerTask(Task):
    """One RULER task. `length` counts prompt, chat template, answer prefix and the tokens kept for the answer.

    Attributes:
        essays: file or folder of running text for the essay haystack; `None` = the data folder's.
        squad_file: SQuAD-format file for qa_1; `None` = the data folder's.
        hotpot_file: HotpotQA distractor file for qa_2; `None` = the data folder's.
    """

    essays: Path | str | None = None
    squad_file: Path | str | None = None
    hotpot_file: Path | str | None = None
    options: ClassVar[tuple[str, ...]] = ("essays", "squad_file", "hotpot_file")

    def samples(
        self,
        tokenizer: Tokenizer,
        length: int | None = None,
        num_samples: int | None = None,
        seed: int = 42,
        data_dir: Path | str | None = None,
        cache_dir: Path | str | None = None,
    ) -> list[EvalSample]:
        """See `Task.samples`. All = 500 samples (for qa: at most as many as the file has questions)."""
        check_num_samples(num_samples)
        if length is None:
            raise UserError(f"{self.name} is generated to a length: pass lengths in tokens, such as 4096.")
        generator = self._generator(tokenizer, length, data_dir)
        key = {
            "format": FORMAT,
            "task": self.name,
            "length": length,
            "num_samples": num_samples,
            "seed": seed,
            "tokenizer": fingerprint(tokenizer),
            **generator.facts(),
        }
        name = f"{self.name}_{length}_{num_samples or DEFAULT_SAMPLES}"
        return cached(cache_dir, name, key, lambda: self._make(generator, tokenizer, length, num_samples, seed))

    def _make(
        self, generator: Generator, tokenizer: Tokenizer, length: int, num_samples: int | None, seed: int
    ) -> list[EvalSample]:
        fitter = Fitter(generator, tokenizer, length, self.max_new_tokens, f"{seed}/{self.name}/{length}")
        size = fitter.size()
        count = num_samples or DEFAULT_SAMPLES
        if isinstance(generator, DocumentGenerator):
            count = min(count, generator.num_questions)
        return [self._sample(fitter, index, size, length) for index in range(count)]

    def _sample(self, fitter: Fitter, index: int, size: int, length: int) -> EvalSample:
        draft, num_tokens = fitter.sample(index, size)
        extra: dict[str, Any] = {"gold_spans": [list(span) for span in draft.gold_spans], "num_tokens": num_tokens}
        return EvalSample(
            sample_id=str(index),
            task=self.name,
            length=length,
            context=draft.context,
            question=draft.question,
            answers=draft.answers,
            max_new_tokens=self.max_new_tokens,
            answer_prefix=draft.answer_prefix,
            extra=extra | draft.extra,
        )

    def _generator(self, tokenizer: Tokenizer, length: int, data_dir: Path | str | None) -> Generator:
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
