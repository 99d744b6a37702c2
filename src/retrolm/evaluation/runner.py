"""Tasks × lengths × methods × budgets: each sample answered once, whatever happens in between.

Results go to a folder: `samples.jsonl` grows by one row per answered sample, `cells.jsonl` is written anew from it. A
run that was stopped goes on where it was; samples whose rows are there are not answered again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import unknown
from .answering import Answerer
from .journal import Journal, write_lines
from .rows import cell_identity, cell_name, cells_of, sample_key, sample_row
from .stopping import stop_strings
from .tasks import EvalSample, Task, Tokenizer, get_task
from .variants import Variant

SAMPLES_FILE = "samples.jsonl"
CELLS_FILE = "cells.jsonl"


@dataclass(frozen=True)
class SampleSet:
    """Samples of one task and length; `length` None is their natural one."""

    task: Task
    length: int | None
    samples: list[EvalSample]


@dataclass(frozen=True)
class DataOptions:
    """Where samples come from; see `Task.samples`. `task_options` go to the tasks that have them."""

    num_samples: int | None = None
    seed: int = 42
    data_dir: Path | str | None = None
    cache_dir: Path | str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)


class Events:
    """What a run tells while it goes; override what is of interest."""

    def cell_begins(self, name: str, num_done: int, num_samples: int) -> None:
        """A cell begins, with samples that were there already."""

    def samples_done(self, num_done: int, num_samples: int) -> None:
        """Samples of the current cell were written."""

    def cell_ends(self, cell: dict[str, Any]) -> None:
        """A cell is complete; `cell` is its row."""


def sample_sets(
    tokenizer: Tokenizer, tasks: Sequence[str], lengths: Sequence[int | None], options: DataOptions
) -> Iterator[SampleSet]:
    """Make or load the samples, shortest length first; raises `UserError` for missing data with how to get it."""
    chosen = tasks_with(tasks, options.task_options)
    for length in lengths:
        for task in chosen:
            samples = task.samples(
                tokenizer, length, options.num_samples, options.seed, options.data_dir, options.cache_dir
            )
            yield SampleSet(task, length, samples)


def tasks_with(names: Sequence[str], options: dict[str, Any]) -> list[Task]:
    """Tasks, each with those of the options that it has; raises `UserError` for an option that none has."""
    tasks = [get_task(name) for name in names]
    known = {name for task in tasks for name in task.options}
    for name in options:
        if name not in known:
            raise unknown("task option", name, known)
    return [task.with_options({key: options[key] for key in options if key in task.options}) for task in tasks]


def check_folder(out: Path) -> None:
    """Raise what `Runner.run` would raise for its folder, before any work is done."""
    with Journal(out / SAMPLES_FILE):
        pass


class Runner:
    """Runs variants over sample sets into a folder; only this process writes there, wherever samples are answered.

    Args:
        answerer: answers the samples, here or elsewhere.
        batch_size: samples read and answered side by side. retry_failed: answer samples again whose row is an error.
    """

    def __init__(
        self,
        answerer: Answerer,
        out: Path,
        *,
        seed: int = 42,
        batch_size: int = 1,
        retry_failed: bool = False,
        events: Events | None = None,
    ) -> None:
        self._answerer = answerer
        self._out = out
        self._seed = seed
        self._batch_size = batch_size
        self._retry_failed = retry_failed
        self._events = events or Events()

    def run(self, sets: Sequence[SampleSet], variants: Sequence[Variant]) -> list[dict[str, Any]]:
        """Answer what isn't answered yet; returns the cells of these sets and variants.

        Raises:
            UserError: the folder is in use or broken, or a variant can't be opened.
            BudgetError: a method attended more than its budget.
        """
        with Journal(self._out / SAMPLES_FILE) as journal:
            cells = [self._cell(journal, part, variant) for part in sets for variant in variants]
            self._write_cells(journal)
            return cells

    def _cell(self, journal: Journal, part: SampleSet, variant: Variant) -> dict[str, Any]:
        identity = cell_identity(part.task, part.length, self._seed, self._answerer.facts(variant))
        left = [sample for sample in part.samples if not self._is_done(journal, identity, sample)]
        done, total = len(part.samples) - len(left), len(part.samples)
        self._events.cell_begins(cell_name(identity), done, total)
        for answers in self._answerer.answers(variant, batches(left, self._batch_size)):
            for found in answers:
                journal.append(
                    sample_row(identity, found.sample, part.task, found.outcome, found.measured, found.provenance)
                )
            done += len(answers)
            self._events.samples_done(done, total)
        keys = {sample_key(identity, sample) for sample in part.samples}
        cell = cells_of(row for key, row in journal.rows.items() if key in keys)[0]
        self._events.cell_ends(cell)
        self._write_cells(journal)
        return cell

    def _is_done(self, journal: Journal, identity: dict[str, Any], sample: EvalSample) -> bool:
        row = journal.rows.get(sample_key(identity, sample))
        return row is not None and not (self._retry_failed and row["failed"])

    def _write_cells(self, journal: Journal) -> None:
        write_lines(self._out / CELLS_FILE, cells_of(journal.rows.values()))


def batches(samples: Sequence[EvalSample], batch_size: int) -> Iterator[list[EvalSample]]:
    """Samples in groups that can be answered by one call: same limit, stop strings and chat setting."""
    groups: dict[tuple[Any, ...], list[EvalSample]] = {}
    for sample in samples:
        groups.setdefault((sample.max_new_tokens, stop_strings(sample), sample.chat), []).append(sample)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]
