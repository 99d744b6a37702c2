"""One table of all methods: scores by task and length, with latency and memory in the same rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..averages import average
from .costs import cells_at, memory_kind, memory_name
from .results import Column, Results
from .table import BEYOND, BEYOND_NOTE, MISSING, Table, budget, label, length_name

NOTE = (
    "Means over the tasks of a group, each of the same weight; intervals stand in the tables by length. First token: "
    "from the start of reading, for the whole batch. Times are medians over samples and tasks, memory is the peak."
)


@dataclass(frozen=True)
class Matrix:
    """What stands in the table.

    Attributes:
        groups: tasks by the name of their columns. costs: rows to take times and memory from, of runs that had the
            machine to themselves; None = the scored rows.
    """

    groups: Mapping[str, Sequence[str]]
    costs: Results | None = None


def matrix_table(results: Results, matrix: Matrix) -> Table:
    """A row per method, a column per group and length that occur together; costs at the longest length measured."""
    places = [(name, length) for name, tasks in matrix.groups.items() for length in _lengths(results, tasks)]
    costs = results if matrix.costs is None else matrix.costs
    timed = max((cell["length"] or 0 for cell in costs.cells), default=0) or None
    rows = []
    for column in results.columns():
        scores = [_score(results, column, matrix.groups[name], length) for name, length in places]
        if any(score != MISSING for score in scores):
            rows.append(
                [label(column, results), column.prefill, budget(column), *scores, *_costs(costs, column, timed)]
            )
    memory = memory_name(memory_kind(costs))
    head = [f"{name} {length_name(length)}" for name, length in places]
    head = ["", "prefill", "KV budget", *head, "first token (s)", "per token (ms)", f"{memory} (GB)"]
    marked = any(cell.endswith(BEYOND) for row in rows for cell in row[3:])
    title = f"All methods; times and memory at {length_name(timed)}"
    notes = [NOTE, _samples(results, matrix), *([BEYOND_NOTE] if marked else [])]
    return Table(title, head, rows, " ".join(notes))


def _samples(results: Results, matrix: Matrix) -> str:
    tasks = {task for group in matrix.groups.values() for task in group}
    counts = {cell["num_samples"] for cell in results.cells if cell["task"] in tasks} or {0}
    span = str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"Samples per task and length: {span}."


def _lengths(results: Results, tasks: Sequence[str]) -> list[int | None]:
    found = {cell["length"] for cell in results.cells if cell["task"] in tasks}
    return sorted(found, key=lambda length: length or 0)


def _score(results: Results, column: Column, tasks: Sequence[str], length: int | None) -> str:
    cells = results.by_task(column, tasks, length)
    score = average({task: cell["score"] for task, cell in cells.items()}, tasks)
    if score is None:
        return MISSING
    mark = BEYOND if any(cell["beyond_window"] for cell in cells.values()) else ""
    return f"{100 * score:.1f}{mark}"


def _costs(costs: Results, column: Column, length: int | None) -> list[str]:
    cells = [cell for cell in cells_at(costs, column, length) if cell["ttft_s"] is not None]
    if not cells:
        return [MISSING] * 3
    peak = max(cell[memory_kind(costs)] for cell in cells)
    return [f"{_middle(cells, 'ttft_s'):.2f}", f"{1000 * _middle(cells, 'tpot_s'):.1f}", f"{peak / 1e9:.2f}"]


def _middle(cells: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(cell[name] for cell in cells)
