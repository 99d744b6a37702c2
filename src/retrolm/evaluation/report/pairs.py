"""Paired comparisons: two methods on the same questions, each task of the same weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..statistics import PairedDifference, paired_average
from ..variants import UNTRAINED
from .results import Column, Results
from .table import BEYOND, BEYOND_NOTE, Table, block_title, blocks, budget, label, length_name

OURS = "retrolm"
MARGIN = 0.03
_MARGIN_TEXT = f"{100 * MARGIN:g}"
NOTE = (
    "Questions that both answered, tasks of equal weight; 95% bootstrap interval. p: exact McNemar test where all "
    f"scores are 0 or 1, else sign flips. Not below: the interval's lower end is at or above -{_MARGIN_TEXT} points."
)


@dataclass(frozen=True)
class Scope:
    """What an average runs over: some tasks at one length."""

    title: str
    tasks: tuple[str, ...]
    length: int | None


@dataclass(frozen=True)
class Pair:
    """`first` minus `second` over a scope.

    Attributes:
        num_tasks: tasks that both have. beyond: whether a text of either went beyond the model's window.
    """

    scope: Scope
    first: Column
    second: Column
    found: PairedDifference
    num_tasks: int
    beyond: bool

    @property
    def is_not_below(self) -> bool:
        """Non-inferiority: whether the lower end of the interval is at or above -3 points."""
        return self.found.low >= -MARGIN


def scopes(results: Results) -> list[Scope]:
    """Each family at each length, and the groups in it that are complete and more than one task."""
    found = []
    for name, length in results.places():
        tasks = tuple(results.tasks(name, length))
        found.append(Scope(f"{name}, {length_name(length)}", tasks, length))
        for group in results.complete_groups(tasks):
            members = results.groups[group]
            if set(members) != set(tasks):
                found.append(Scope(f"average {group}, {length_name(length)}", members, length))
    return found


def compare(results: Results, scope: Scope, first: Column, second: Column) -> Pair | None:
    """`first` minus `second` on the questions that both answered; None where they share none."""
    shared: list[tuple[list[float], list[float]]] = []
    beyond = False
    for task in scope.tasks:
        cells = results.cell(first, task, scope.length), results.cell(second, task, scope.length)
        if cells[0] is not None and cells[1] is not None:
            scores = shared_scores(results, cells[0], cells[1])
            if scores[0]:
                shared.append(scores)
                beyond |= cells[0]["beyond_window"] or cells[1]["beyond_window"]
    return Pair(scope, first, second, paired_average(shared), len(shared), beyond) if shared else None


def shared_scores(results: Results, first: dict[str, Any], second: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Scores of two cells on the samples that both have, in the same order."""
    left, right = results.scores(first), results.scores(second)
    shared = [sample_id for sample_id in left if sample_id in right]
    return [left[sample_id] for sample_id in shared], [right[sample_id] for sample_id in shared]


def pair_tables(results: Results) -> list[Table]:
    """Every method against dense attention, and RetroLM against every method at its budget, by kind of prefill."""
    tables = []
    for scope in scopes(results):
        for base in _bases(results):
            others = [c for c in results.columns() if c.model == base.model and c != base]
            found = [pair for c in others if (pair := compare(results, scope, c, base))]
            dense = f"dense attention{f' ({base.adapter})' if base.adapter else ''}"
            tables += _blocks(results, f"{scope.title}: paired difference to {dense}", found, first=True)
        for ours in _ours(results):
            others = [c for c in results.columns() if c.model == ours.model and c not in (ours, *_bases(results))]
            same = [c for c in others if c.kv_budget in (ours.kv_budget, None)]
            found = [pair for c in same if (pair := compare(results, scope, ours, c))]
            tables += _blocks(results, f"{scope.title}: {ours.name}, less the method of the row", found, first=False)
    return tables


def _bases(results: Results) -> list[Column]:
    return [column for column in results.columns() if column.is_full]


def _ours(results: Results) -> list[Column]:
    return [column for column in results.columns() if column.method == OURS and column.retriever != UNTRAINED]


def _blocks(results: Results, title: str, pairs: Sequence[Pair], first: bool) -> list[Table]:
    """One table per kind of prefill of the row's method."""
    tables = []
    for prefill in blocks(results):
        rows = []
        for pair in pairs:
            column = pair.first if first else pair.second
            if column.prefill == prefill:
                rows.append([label(column, results), budget(column), *_figures(pair)])
        if rows:
            head = ["", "KV budget", "tasks", "questions", "difference", "p", "test", f"not below (-{_MARGIN_TEXT})"]
            marked = any(row[4].endswith(BEYOND) for row in rows)
            tables.append(Table(f"{title} ({block_title(prefill)})", head, rows, BEYOND_NOTE if marked else ""))
    return tables


def _figures(pair: Pair) -> list[str]:
    found = pair.found
    interval = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    p_value = "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
    shown = interval + (BEYOND if pair.beyond else "")
    return [str(pair.num_tasks), str(found.num_pairs), shown, p_value, found.test, "yes" if pair.is_not_below else "no"]


def pair_rows(results: Results) -> list[dict[str, Any]]:
    """Every pair of columns of one model over every scope, for the CSV file."""
    rows = []
    for scope in scopes(results):
        columns = results.columns()
        for index, first in enumerate(columns):
            for second in columns[index + 1 :]:
                if first.model == second.model and (pair := compare(results, scope, first, second)):
                    rows.append(_row(pair))
    return rows


def _row(pair: Pair) -> dict[str, Any]:
    return {
        "scope": pair.scope.title,
        "length": pair.scope.length,
        "model": pair.first.model,
        "first": pair.first.name,
        "first_prefill": pair.first.prefill,
        "second": pair.second.name,
        "second_prefill": pair.second.prefill,
        "num_tasks": pair.num_tasks,
        **asdict(pair.found),
        "not_below": pair.is_not_below,
        "beyond_window": pair.beyond,
    }
