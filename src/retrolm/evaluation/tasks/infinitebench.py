"""InfiniteBench (Zhang et al. 2024, arXiv:2402.13718): the book tasks from its files, the synthetic ones made anew."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ... import metrics
from ...errors import UserError, unknown
from .files import Source, find_file
from .generated import GeneratedTask
from .generator import Generator, split_template
from .infinitebench_generate import GENERATORS
from .infinitebench_prompts import PROMPT_SETS
from .prompt import Tokenizer, truncate_middle
from .row_task import RowTask
from .sample import EvalSample
from .task import Task

SOURCE = Source(
    title="InfiniteBench",
    places=("infinitebench/{stem}.jsonl", "InfiniteBench/{stem}.jsonl", "{stem}.jsonl", "{stem}.jsonl.gz"),
    how=(
        "Download the file of the same name of the data set xinrongzhang2022/InfiniteBench from the Hugging Face hub, "
        "or pass the data folder 'hub' where a network allows. The books can't be made anew."
    ),
    hub_repo="xinrongzhang2022/InfiniteBench",
    hub_file="{stem}.jsonl",
)
BOOK_METRICS = {"longbook_qa_eng": "qa_f1", "longbook_sum_eng": "rouge_lsum", "longbook_choice_eng": "accuracy"}
SYNTHETIC_SAMPLES = {"math_find": 350, "passkey": 590, "number_string": 590, "kv_retrieval": 500}


@dataclass(frozen=True)
class InfiniteBenchTask(Task):
    """What book and synthetic tasks share.

    Attributes:
        prompts: "base" (default), "chat" or "infllm"; sets the limit on new tokens as well.
        chat: on by default, as in the RetroLM authors' harness; the benchmark's own code wraps only for hosted models.
    """

    prompts: str = "base"
    options: ClassVar[tuple[str, ...]] = ("prompts", "chat")

    @property
    def task(self) -> str:
        """The benchmark's name of the task."""
        return self.name.split("/")[1]

    @property
    def template(self) -> str:
        """Prompt of the chosen set."""
        return PROMPT_SETS[self.prompts].templates[self.task]

    def with_options(self: BenchT, options: dict[str, Any]) -> BenchT:
        """See `Task.with_options`; the limit on new tokens follows the prompts."""
        changed = super().with_options(options)
        allowed = [name for name, prompts in PROMPT_SETS.items() if self.task in prompts.templates]
        if changed.prompts not in allowed:
            raise unknown(f"set of prompts for {self.name!r}", changed.prompts, allowed)
        return dataclasses.replace(changed, max_new_tokens=PROMPT_SETS[changed.prompts].max_new_tokens[self.task])


BenchT = TypeVar("BenchT", bound=InfiniteBenchTask)


@dataclass(frozen=True)
class BookTask(InfiniteBenchTask, RowTask):
    """Questions, summaries and choices over novels. A prompt over `length` tokens loses its middle (e.g. 128000)."""

    fields: ClassVar[tuple[str, ...]] = ("id", "context", "input", "answer", "options")

    def file(self, data_dir: Path | str | None) -> Path:
        """See `RowTask.file`."""
        return find_file(SOURCE, data_dir, self.task)

    def sample(self, tokenizer: Tokenizer, row: dict[str, Any], length: int | None) -> EvalSample:
        """See `RowTask.sample`."""
        options = dict(zip("ABCD", row["options"], strict=False))
        parts = split_template(self.template, row["context"], question=row["input"], **options)
        context, question = truncate_middle(tokenizer, *parts, length)
        return EvalSample(
            sample_id=str(row["id"]),
            task=self.name,
            length=length,
            context=context,
            question=question,
            answers=self._answers(row),
            max_new_tokens=self.max_new_tokens,
            chat=self.chat,
            extra={"prompts": self.prompts},
        )

    def _answers(self, row: dict[str, Any]) -> list[str]:
        """The references; for a choice, the right option's text and its letter."""
        answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
        if self.task != "longbook_choice_eng":
            return answers
        if answers[0] not in row["options"]:
            raise UserError(f"{self.name}: the answer of row {row['id']} isn't among its options. Get the file again.")
        return [answers[0], "ABCD"[row["options"].index(answers[0])]]

    def score(self, prediction: str, sample: EvalSample) -> float:
        """Token F1, summary-level ROUGE-L (Google's) or right choice."""
        if self.task == "longbook_qa_eng":
            return metrics.qa_f1(prediction, sample.answers)
        if self.task == "longbook_sum_eng":
            return metrics.rouge_lsum(prediction, sample.answers)
        return metrics.longbook_choice(prediction, sample.answers)

    def extra_scores(self, prediction: str, sample: EvalSample) -> dict[str, float]:
        """Summaries: also ROUGE-L as LongBench has it, which the RetroLM authors' harness uses here."""
        if self.task != "longbook_sum_eng":
            return {}
        return {"rouge_l": max(metrics.rouge_l(prediction, answer) for answer in sample.answers)}


@dataclass(frozen=True)
class SyntheticTask(InfiniteBenchTask, GeneratedTask):
    """Numbers and keys in synthetic text; `length=None` makes the benchmark's own size (about 88K to 130K tokens)."""

    def generator(self, tokenizer: Tokenizer, length: int | None, seed: int, data_dir: Path | str | None) -> Generator:
        """See `GeneratedTask.generator`; needs no data."""
        return GENERATORS[self.task](self.template)

    def score(self, prediction: str, sample: EvalSample) -> float:
        """1 for the right number or value, by the benchmark's rules for reading it."""
        label = sample.answers[0]
        if self.task == "math_find":
            return metrics.math_find(prediction, _number(label))
        if self.task == "kv_retrieval":
            return metrics.kv_retrieval(prediction, label)
        return metrics.first_integer(prediction, label)


def _number(label: str) -> int | float:
    try:
        return float(label) if "." in label else int(label)
    except ValueError:
        raise UserError(f"The answer of a math_find question is a number, got {label!r}.") from None


def infinitebench_tasks() -> list[InfiniteBenchTask]:
    """Three book tasks and four synthetic ones."""
    limits = PROMPT_SETS["base"].max_new_tokens
    books: list[InfiniteBenchTask] = [
        BookTask(f"infinitebench/{task}", limits[task], metric) for task, metric in BOOK_METRICS.items()
    ]
    return books + [
        SyntheticTask(f"infinitebench/{task}", limits[task], "accuracy", default_samples=count)
        for task, count in SYNTHETIC_SAMPLES.items()
    ]
