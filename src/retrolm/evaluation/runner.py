"""Tasks × lengths × methods × budgets: each sample answered once, whatever happens in between.

Results go to a folder: `samples.jsonl` grows by one row per answered sample, `cells.jsonl` is written anew from it. A
run that was stopped goes on where it was; samples whose rows are there are not answered again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.memory import PeakMemory
from ..errors import unknown
from .journal import Journal, write_lines
from .readers import BudgetError, Prediction, Reader
from .rows import cell_identity, cell_name, cells_of, sample_key, sample_row
from .stopping import stop_strings
from .tasks import EvalSample, Task, Tokenizer, get_task
from .variants import OpenVariant, Variant, VariantLoader

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


class Runner:
    """Runs variants over sample sets into a folder.

    Args:
        provenance: facts of this run for its rows (commit, versions, hardware, command, measured_at).
        batch_size: samples read and answered side by side. retry_failed: answer samples again whose row is an error.
    """

    def __init__(
        self,
        loader: VariantLoader,
        out: Path,
        provenance: dict[str, Any],
        *,
        seed: int = 42,
        batch_size: int = 1,
        retry_failed: bool = False,
        events: Events | None = None,
    ) -> None:
        self._loader = loader
        self._out = out
        self._provenance = provenance
        self._seed = seed
        self._batch_size = batch_size
        self._retry_failed = retry_failed
        self._events = events or Events()

    def run(self, sets: Sequence[SampleSet], variants: Sequence[Variant]) -> list[dict[str, Any]]:
        """Answer what isn't answered yet; returns all cells of the folder.

        Raises:
            UserError: the folder is in use or broken, or a variant can't be opened.
            BudgetError: a method attended more than its budget.
        """
        with Journal(self._out / SAMPLES_FILE) as journal:
            for part in sets:
                for variant in variants:
                    self._cell(journal, part, self._loader.open(variant))
            return self._write_cells(journal)

    def _cell(self, journal: Journal, part: SampleSet, variant: OpenVariant) -> None:
        identity = cell_identity(part.task, part.length, self._seed, variant.facts)
        left = [sample for sample in part.samples if not self._is_done(journal, identity, sample)]
        done, total = len(part.samples) - len(left), len(part.samples)
        self._events.cell_begins(cell_name(identity), done, total)
        for batch in batches(left, self._batch_size):
            for row in self._answer(identity, part.task, variant, batch):
                journal.append(row)
            done += len(batch)
            self._events.samples_done(done, total)
        keys = {sample_key(identity, sample) for sample in part.samples}
        self._events.cell_ends(cells_of(row for key, row in journal.rows.items() if key in keys)[0])
        self._write_cells(journal)

    def _is_done(self, journal: Journal, identity: dict[str, Any], sample: EvalSample) -> bool:
        row = journal.rows.get(sample_key(identity, sample))
        return row is not None and not (self._retry_failed and row["failed"])

    def _answer(
        self, identity: dict[str, Any], task: Task, variant: OpenVariant, batch: list[EvalSample]
    ) -> Iterator[dict[str, Any]]:
        """Rows of one batch; where a batch breaks, its samples are tried one by one."""
        with PeakMemory([info.device for info in variant.lm.backbone.layers]) as memory:
            started = time.perf_counter()
            outcomes = attempt(variant.reader, batch)
            total_s = time.perf_counter() - started
        if outcomes is None:
            for sample in batch:
                yield from self._answer(identity, task, variant, [sample])
            return
        measured = {
            "total_s": total_s / len(batch),
            "batch_size": len(batch),
            "peak_device_bytes": memory.device_peak_bytes,
            "peak_host_bytes": memory.host_peak_bytes,
        }
        for sample, outcome in zip(batch, outcomes, strict=True):
            beyond = not isinstance(outcome, str) and outcome.num_tokens > variant.num_window
            own = {**measured, "beyond_window": beyond}
            yield sample_row(identity, sample, task, outcome, own, self._provenance)

    def _write_cells(self, journal: Journal) -> list[dict[str, Any]]:
        cells = cells_of(journal.rows.values())
        write_lines(self._out / CELLS_FILE, cells)
        return cells


def attempt(reader: Reader, batch: Sequence[EvalSample]) -> Sequence[Prediction | str] | None:
    """Answers of a batch; the error's text for a single sample that breaks, None for a batch that does."""
    try:
        return reader.answer(batch)
    except BudgetError:
        raise
    except Exception as error:
        return [f"{type(error).__name__}: {' '.join(str(error).split())}"] if len(batch) == 1 else None


def batches(samples: Sequence[EvalSample], batch_size: int) -> Iterator[list[EvalSample]]:
    """Samples in groups that can be answered by one call: same limit, stop strings and chat setting."""
    groups: dict[tuple[Any, ...], list[EvalSample]] = {}
    for sample in samples:
        groups.setdefault((sample.max_new_tokens, stop_strings(sample), sample.chat), []).append(sample)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]
