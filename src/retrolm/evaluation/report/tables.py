"""The report's tables of scores, and all tables in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..averages import average, by_bucket
from ..constant_guess import MATH_FIND, math_find_guess
from .costs import cost_tables
from .pairs import pair_tables
from .recall_tables import recall_tables
from .results import Column, Results, column_of
from .table import (
    BEYOND,
    BEYOND_NOTE,
    MISSING,
    Table,
    block_title,
    blocks,
    budget,
    cells_interval,
    label,
    length_name,
    with_interval,
)


def all_tables(results: Results) -> list[Table]:
    """All tables that the rows allow."""
    tables = [table for place in results.places() for table in score_tables(results, *place)]
    return tables + pair_tables(results) + cost_tables(results) + bucket_tables(results) + recall_tables(results)


def score_tables(results: Results, name: str, length: int | None) -> list[Table]:
    """Scores of a family at a length: kinds of prefill apart, averages of the complete groups."""
    tasks = results.tasks(name, length)
    groups = results.complete_groups(tasks)
    tables = []
    for prefill in blocks(results):
        rows = [
            _score_row(results, column, tasks, groups, length)
            for column in results.columns()
            if column.prefill == prefill and any(results.cell(column, task, length) for task in tasks)
        ]
        if rows:
            head = ["", "KV budget", *(task.split("/")[1] for task in tasks), *(f"average {group}" for group in groups)]
            note = _note(tasks, any(BEYOND in cell for row in rows for cell in row[2:]))
            tables.append(Table(f"{name}, {length_name(length)}: {block_title(prefill)}", head, rows, note))
    return tables


def _note(tasks: Sequence[str], beyond: bool) -> str:
    guess = f"math_find: the best constant guess per kind of question scores {100 * math_find_guess():.1f}."
    return " ".join([*([BEYOND_NOTE] if beyond else []), *([guess] if MATH_FIND in tasks else [])])


def _score_row(results: Results, column: Column, tasks: list[str], groups: list[str], length: int | None) -> list[str]:
    cells = results.by_task(column, tasks, length)
    shown = [_score(cells[task]) if task in cells else MISSING for task in tasks]
    averages = [_average(cells, results.groups[group]) for group in groups]
    return [label(column, results), budget(column), *shown, *averages]


def _score(cell: dict[str, Any]) -> str:
    mark = BEYOND if cell["beyond_window"] else ""
    failed = f", {cell['num_failed']} failed" if cell["num_failed"] else ""
    return f"{with_interval(cell['score'], *cell['score_ci'])}{mark}{failed}"


def _average(cells: dict[str, dict[str, Any]], tasks: Sequence[str]) -> str:
    score = average({task: cell["score"] for task, cell in cells.items()}, tasks)
    if score is None:
        return MISSING
    members = [cells[task] for task in tasks]
    mark = BEYOND if any(cell["beyond_window"] for cell in members) else ""
    return with_interval(score, *cells_interval(members)) + mark


def bucket_tables(results: Results) -> list[Table]:
    """Scores by length class, for sets whose samples carry one (LongBench-E)."""
    tables = []
    for task in results.all_tasks():
        labels = {row["sample_id"]: row["labels"].get("bucket") for row in results.samples if row["task"] == task}
        names = sorted({name for name in labels.values() if name})
        rows = [_bucket_row(results, cell, labels, names) for cell in results.cells if cell["task"] == task]
        if names:
            tables.append(Table(f"{task} by length class (words)", ["", "length", *names], rows))
    return tables


def _bucket_row(results: Results, cell: dict[str, Any], labels: dict[str, str | None], names: list[str]) -> list[str]:
    scores = results.scores(cell)
    found = by_bucket(list(scores.values()), [labels[sample_id] or "" for sample_id in scores])
    return [column_of(cell).name, length_name(cell["length"]), *(str(found.get(name, MISSING)) for name in names)]


def overview_table(results: Results) -> Table:
    """Mean over a family's tasks by length, where all columns of a length have the same tasks."""
    places = results.places()
    rows = []
    for column in results.columns():
        shown = [_family_mean(results, column, *place) for place in places]
        rows.append([label(column, results), column.prefill, budget(column), *shown])
    head = ["", "prefill", "KV budget", *(f"{name} {length_name(length)}" for name, length in places)]
    return Table(
        "Overview: mean over tasks", head, rows, "Unweighted means over all tasks of the family in this report."
    )


def _family_mean(results: Results, column: Column, name: str, length: int | None) -> str:
    tasks = results.tasks(name, length)
    return _average(results.by_task(column, tasks, length), tasks)
