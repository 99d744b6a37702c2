"""Rows of several folders, by column of comparison."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..journal import read_lines
from ..retrieval.run import RECALL_FILE
from ..rows import ROW_KEYS, cells_of
from ..runner import SAMPLES_FILE
from ..tasks import GROUPS
from ..variants import UNTRAINED

DENSE = "full"


@dataclass(frozen=True)
class Column:
    """One line of the tables: what was compared under a name of its own.

    Attributes:
        prefill: "dense" or "streaming". settings: options and knobs that are not the defaults. suffix: tells apart
            what the other fields don't (dtype, rows of earlier versions).
    """

    model: str
    adapter: str | None
    prefill: str
    method: str
    retriever: str | None
    kv_budget: int | None
    settings: str = ""
    suffix: str = ""

    @property
    def is_full(self) -> bool:
        """Whether it is full attention, which every other column is read against."""
        return self.method == DENSE

    @property
    def name(self) -> str:
        """Method with retriever and budget."""
        return f"{self.method_name}, {self.kv_budget} tokens" if self.kv_budget else self.method_name

    @property
    def method_name(self) -> str:
        """Method with its retriever; untrained bookmarks are the paper's "w/o Stage1"."""
        trained = "untrained, w/o stage 1" if self.retriever == UNTRAINED else self.retriever
        parts = [part for part in (trained, self.adapter, self.settings, self.suffix) if part]
        return f"{self.method} ({', '.join(parts)})" if parts else self.method


@dataclass(frozen=True)
class Results:
    """All rows of a report.

    Attributes:
        samples: sample rows. cells: their sums, in order of appearance. recall: page-recall rows.
        groups: tasks that are averaged over, by the group's name.
    """

    samples: list[dict[str, Any]]
    cells: list[dict[str, Any]]
    recall: list[dict[str, Any]]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(GROUPS))

    @cached_property
    def _cells_by_place(self) -> dict[Any, dict[str, Any]]:
        return {(column_of(cell), cell["task"], cell["length"]): cell for cell in self.cells}

    @cached_property
    def _scores_by_cell(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for row in self.samples:
            found.setdefault(row["config_hash"], {})[row["sample_id"]] = row["score"]
        return found

    def only(self, config_hashes: Collection[str]) -> Results:
        """The part with these cells, without page recall."""
        samples = [row for row in self.samples if row["config_hash"] in config_hashes]
        cells = [cell for cell in self.cells if cell["config_hash"] in config_hashes]
        return Results(samples, cells, [], self.groups)

    def columns(self) -> list[Column]:
        """All columns, dense prefill first, then by method and budget."""
        found = dict.fromkeys(column_of(cell) for cell in self.cells)
        return sorted(
            found,
            key=lambda c: (
                c.model,
                c.prefill,
                not c.is_full,
                c.method,
                str(c.retriever),
                c.kv_budget or 0,
                c.settings,
            ),
        )

    def cell(self, column: Column, task: str, length: int | None) -> dict[str, Any] | None:
        """The cell of a column, task and length."""
        return self._cells_by_place.get((column, task, length))

    def by_task(self, column: Column, tasks: Iterable[str], length: int | None) -> dict[str, dict[str, Any]]:
        """Those of the tasks' cells that a column has at a length."""
        return {task: cell for task in tasks if (cell := self.cell(column, task, length)) is not None}

    def scores(self, cell: dict[str, Any]) -> dict[str, float]:
        """Sample scores of a cell by sample id."""
        return self._scores_by_cell[cell["config_hash"]]

    def all_tasks(self) -> list[str]:
        """All tasks, in order of appearance."""
        return list(dict.fromkeys(cell["task"] for cell in self.cells))

    def places(self) -> list[tuple[str, int | None]]:
        """Families of tasks and lengths that occur: ("ruler", 4096)."""
        found = dict.fromkeys((family(cell["task"]), cell["length"]) for cell in self.cells)
        return sorted(found, key=lambda place: (place[0], place[1] or 0))

    def tasks(self, name: str, length: int | None) -> list[str]:
        """Tasks of a family that occur at a length, in the order of the family's group."""
        found = {cell["task"] for cell in self.cells if family(cell["task"]) == name and cell["length"] == length}
        order = {task: index for tasks in self.groups.values() for index, task in enumerate(tasks)}
        return sorted(found, key=lambda task: (order.get(task, 0), task))

    def complete_groups(self, tasks: Iterable[str]) -> list[str]:
        """Groups of two tasks or more that are all there, larger groups last; of the same tasks one, the last named."""
        there = set(tasks)
        found = {
            frozenset(members): name
            for name, members in self.groups.items()
            if len(members) > 1 and set(members) <= there
        }
        return sorted(found.values(), key=lambda name: len(self.groups[name]))


def column_of(cell: dict[str, Any]) -> Column:
    """The column that a cell belongs to."""
    fields = {key: cell[key] for key in ("model", "adapter", "prefill", "method", "retriever", "kv_budget")}
    return Column(**fields, settings=cell.get("settings", ""), suffix=cell.get("suffix", ""))


def family(task: str) -> str:
    """First part of a task's name."""
    return task.split("/")[0]


def load_results(folders: Sequence[Path], groups: Mapping[str, tuple[str, ...]] | None = None) -> Results:
    """Read the rows of all folders, packed or not; rows of the same sample and settings count once, the last.

    Args:
        groups: tasks to average over by name, beside those of `tasks.GROUPS`.

    Raises `UserError` for a folder without rows, and for a line that is no row.
    """
    samples: dict[str, dict[str, Any]] = {}
    recall: list[dict[str, Any]] = []
    for folder in folders:
        files = [folder / f"{name}{end}" for name in (SAMPLES_FILE, RECALL_FILE) for end in ("", ".gz", ".xz")]
        files = [file for file in files if file.exists()]
        if not files:
            raise UserError(f"{folder} holds neither {SAMPLES_FILE} nor {RECALL_FILE}. Run `retrolm eval --out` first.")
        for file in files:
            if file.name.startswith(RECALL_FILE):
                recall += read_lines(file)
            else:
                samples.update((row["key"], row) for row in read_lines(file, needs=ROW_KEYS))
    if not samples and not recall:
        raise UserError(f"There are no rows in {', '.join(map(str, folders))} yet. Run `retrolm eval --out` first.")
    rows = list(samples.values())
    return Results(rows, told_apart(cells_of(rows)), recall, {**GROUPS, **(groups or {})})


def told_apart(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give cells that would stand in the same place (same column, task, length) a suffix."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault((column_of(cell), cell["task"], cell["length"]), []).append(cell)
    return [
        {**cell, "suffix": "" if len(same) == 1 else f"settings {cell['config_hash'][:6]}"}
        for same in found.values()
        for cell in same
    ]
