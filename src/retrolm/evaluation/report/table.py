"""What all tables of the report share. Scores are shown times 100."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..statistics import average_interval
from .results import Column, Results

MISSING = "–"  # noqa: RUF001
BEYOND = "*"
BEYOND_NOTE = f"{BEYOND} texts beyond the model's window: the stock model runs, but was not trained for such positions."
BLOCKS = {"dense": "dense prefill", "streaming": "streaming prefill"}


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, the others are figures."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def label(column: Column, results: Results) -> str:
    """A column's name, with its model where the report has several."""
    models = {cell["model"] for cell in results.cells}
    return column.method_name if len(models) == 1 else f"{column.model}: {column.method_name}"


def budget(column: Column) -> str:
    """A column's budget in tokens; "all" without one."""
    return str(column.kv_budget or "all")


def block_title(prefill: str) -> str:
    """How a block of methods is headed."""
    return BLOCKS.get(prefill, prefill)


def blocks(results: Results) -> list[str]:
    """The kinds of prefill that occur, dense first."""
    return list(dict.fromkeys(column.prefill for column in sorted(results.columns(), key=lambda c: c.prefill)))


def cells_interval(cells: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """95% interval of the mean over cells."""
    return average_interval([cell["score"] for cell in cells], [cell["score_ci"] for cell in cells])


def with_interval(score: float, low: float, high: float) -> str:
    """A score with its 95% interval, times 100."""
    return f"{100 * score:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def length_name(length: int | None) -> str:
    """A length in words."""
    if length is None:
        return "natural length"
    return f"{length // 1024}K tokens" if length % 1024 == 0 else f"{length} tokens"
