"""LongBench v1, its English sets and LongBench-E (Bai et al. 2023, arXiv:2308.14508)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ... import metrics
from .files import Source, find_file
from .generator import split_template
from .longbench_sets import EXTENDED_SETS, SETS, LongBenchSet, Metric
from .prompt import Tokenizer, truncate_middle
from .row_task import RowTask
from .sample import EvalSample

SOURCE = Source(
    title="LongBench",
    places=(
        "longbench/rows/{stem}.jsonl.gz",
        "longbench/data/{stem}.jsonl",
        "longbench/{stem}.jsonl",
        "LongBench/data/{stem}.jsonl",
        "data/{stem}.jsonl",
        "{stem}.jsonl",
        "{stem}.jsonl.gz",
    ),
    how=(
        "Download data.zip of the data set THUDM/LongBench from the Hugging Face hub and unpack it there, or pass the "
        "data folder 'hub' where a network allows."
    ),
    hub_repo="THUDM/LongBench",
    hub_file="data.zip",
)
_QUESTION_LINES = 11  # ten lines of code and "Next line of code:"


def score_answer(metric: Metric, prediction: str, answer: str, all_classes: list[str]) -> float:
    """Score against one reference answer, in [0, 1]."""
    if metric == "classification":
        return metrics.classification_score(prediction, answer, all_classes)
    if metric == "qa_f1":
        return metrics.qa_f1(prediction, [answer])
    return _SCORERS[metric](prediction, answer)


_SCORERS: dict[str, Callable[[str, str], float]] = {
    "rouge_l": metrics.rouge_l,
    "count": metrics.count_score,
    "retrieval": metrics.retrieval_score,
    "code_similarity": metrics.code_similarity,
}


def _split(settings: LongBenchSet, row: dict[str, Any]) -> tuple[str, str]:
    """Return the prompt as (context, question)."""
    context, question = split_template(settings.prompt, row["context"], input=row["input"])
    if settings.asks == "tail":
        return context, question
    prompt = context + question
    start = prompt.rfind("Question:") if settings.asks == "question" else _last_lines(prompt, _QUESTION_LINES)
    return prompt[:start], prompt[start:]


def _last_lines(text: str, num_lines: int) -> int:
    """Where the last lines of a text begin."""
    lines = text.splitlines(keepends=True)
    return len(text) - sum(map(len, lines[-num_lines:]))


def first_line(prediction: str) -> str:
    """The prediction up to its first line break, leading line breaks aside."""
    return prediction.lstrip("\n").split("\n")[0]


@dataclass(frozen=True)
class LongBenchTask(RowTask):
    """One data set. `length` is the official `max_length`: a longer prompt loses its middle (e.g. 31500).

    LongBench-E rows carry their length class ("0-4k", "4-8k", "8k+", in words) as extra "bucket".
    """

    extended: bool = False
    fields: ClassVar[tuple[str, ...]] = ("_id", "context", "input", "answers", "length", "all_classes")

    @property
    def settings(self) -> LongBenchSet:
        """Prompt, limit and metric of the data set."""
        return SETS[self.name.split("/")[1]]

    def file(self, data_dir: Path | str | None) -> Path:
        """See `RowTask.file`."""
        stem = self.name.split("/")[1] + ("_e" if self.extended else "")
        return find_file(SOURCE, data_dir, stem)

    def sample(self, tokenizer: Tokenizer, row: dict[str, Any], length: int | None) -> EvalSample:
        """See `RowTask.sample`."""
        whole, question = _split(self.settings, row)
        context, question = truncate_middle(tokenizer, whole, question, length, drop_odd=True)
        extra = self._extra(row)
        if context == whole:
            extra["gold_spans"] = self._gold_spans(whole, row)
        return EvalSample(
            sample_id=row["_id"],
            task=self.name,
            length=length,
            context=context,
            question=question,
            answers=row["answers"],
            max_new_tokens=self.max_new_tokens,
            chat=self.chat,
            extra=extra,
        )

    def _extra(self, row: dict[str, Any]) -> dict[str, Any]:
        extra = {"num_words": row["length"], "all_classes": row["all_classes"] or []}
        if self.extended:
            extra["bucket"] = "0-4k" if row["length"] < 4000 else "4-8k" if row["length"] < 8000 else "8k+"
        if self.settings.first_line:
            extra["first_line"] = True
        if self.name.endswith("/samsum"):
            extra["stop"] = ["\n"]
        return extra

    def _gold_spans(self, context: str, row: dict[str, Any]) -> list[list[int]]:
        """The paragraph that is asked for; the other sets don't say where their evidence stands."""
        if self.settings.metric != "retrieval":
            return []
        found = re.search(rf"^{re.escape(row['answers'][0])}: .*$", context, re.MULTILINE)
        return [list(found.span())] if found else []

    def score(self, prediction: str, sample: EvalSample) -> float:
        """Best score against any answer, by the data set's own metric."""
        if self.settings.first_line:
            prediction = first_line(prediction)
        classes = sample.extra["all_classes"]
        return max(score_answer(self.settings.metric, prediction, answer, classes) for answer in sample.answers)


def longbench_tasks() -> list[LongBenchTask]:
    """The 16 English sets as longbench/NAME and the 13 of LongBench-E as longbench-e/NAME."""
    return [_task(name, False) for name in SETS] + [_task(name, True) for name in EXTENDED_SETS]


def _task(name: str, extended: bool) -> LongBenchTask:
    family, entry = "longbench-e" if extended else "longbench", SETS[name]
    return LongBenchTask(f"{family}/{name}", entry.max_new_tokens, entry.metric, chat=entry.chat, extended=extended)
