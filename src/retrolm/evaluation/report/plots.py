"""The report's plots, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ..averages import mean
from .costs import memory_kind, memory_name
from .results import Column, Results, family
from .table import cells_interval, length_name

_MARKERS = "osD^vP*X<>"
_NUM_COLOURS = 10  # of the colour cycle; lines beyond it are dashed
SCORE = "score (of 100, mean over tasks)"


@dataclass(frozen=True)
class Plot:
    """A picture: its name (a file name without ending), what it shows, and the PNG itself."""

    name: str
    title: str
    png: bytes


@dataclass(frozen=True)
class Line:
    """Points of one method: x, mean, and the interval's ends where there is one."""

    label: str
    points: list[tuple[float, float, float, float]]


def all_plots(results: Results) -> list[Plot]:
    """Score by length, score by budget and memory by length, where there are two points or more to join."""
    plots: list[Plot] = []
    kind = memory_kind(results)
    for name in dict.fromkeys(family(cell["task"]) for cell in results.cells):
        lines = by_length(results, name, _mean_score)
        plots += _plot(f"{name}-by-length", f"{name}: score by prompt length", "prompt length (tokens)", SCORE, lines)
        for length in dict.fromkeys(place[1] for place in results.places() if place[0] == name):
            budget = by_budget(results, name, length)
            title = f"{name}, {length_name(length)}: score by KV budget"
            plots += _plot(f"{name}-{length or 'natural'}-by-budget", title, "KV budget (tokens)", SCORE, budget)
        memory = by_length(results, name, lambda cells: _peak_memory(cells, kind))
        plots += _plot(
            f"{name}-memory", f"{name}: {memory_name(kind)}", "prompt length (tokens)", "memory (GB)", memory
        )
    return plots


def by_length(
    results: Results, name: str, value: Callable[[list[dict[str, Any]]], tuple[float, float, float] | None]
) -> list[Line]:
    """One line per column over the lengths at which it has all tasks of the family.

    Lengths at which only a few of the family's tasks were run are left out: their means are of other things.
    """
    lengths = comparable_lengths(results, name)
    return [Line(c.name, _points(results, c, name, [(float(n), n) for n in lengths], value)) for c in results.columns()]


def comparable_lengths(results: Results, name: str) -> list[int]:
    """Lengths that have at least three quarters of the family's tasks."""
    counts = {length: len(results.tasks(name, length)) for place, length in results.places() if place == name}
    return [length for length, count in counts.items() if length is not None and 4 * count >= 3 * max(counts.values())]


def by_budget(results: Results, name: str, length: int | None) -> list[Line]:
    """One line per method over budgets; dense attention is a level line."""
    columns = results.columns()
    budgets = sorted({column.kv_budget for column in columns if column.kv_budget})
    if len(budgets) < 2:
        return []
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for column in columns:
        places = [(float(budget), length) for budget in ([column.kv_budget] if column.kv_budget else budgets)]
        label = column.method_name if column.kv_budget else f"{column.method_name} (no budget)"
        lines.setdefault(label, []).extend(_points(results, column, name, places, _mean_score))
    return [Line(label, points) for label, points in lines.items()]


def _points(
    results: Results,
    column: Column,
    name: str,
    places: list[tuple[float, int | None]],
    value: Callable[[list[dict[str, Any]]], tuple[float, float, float] | None],
) -> list[tuple[float, float, float, float]]:
    points = []
    for x, length in places:
        cells = [results.cell(column, task, length) for task in results.tasks(name, length)]
        there = [cell for cell in cells if cell is not None]
        found = value(there) if there and len(there) == len(cells) else None
        if found is not None:
            points.append((x, *found))
    return points


def _mean_score(cells: list[dict[str, Any]]) -> tuple[float, float, float]:
    low, high = cells_interval(cells)
    return 100 * mean(cell["score"] for cell in cells), 100 * low, 100 * high


def _peak_memory(cells: list[dict[str, Any]], kind: str) -> tuple[float, float, float] | None:
    peak = max(cell[kind] for cell in cells) / 1e9
    return (peak, peak, peak) if peak else None


def _plot(name: str, title: str, x_label: str, y_label: str, lines: list[Line]) -> list[Plot]:
    """A plot, or none where no line has two points."""
    lines = [line for line in lines if line.points]
    if not any(len(line.points) > 1 for line in lines):
        return []
    return [Plot(name, title, _draw(title, x_label, y_label, lines))]


def _draw(title: str, x_label: str, y_label: str, lines: list[Line]) -> bytes:
    figure = _figure()
    axes = figure.add_subplot()
    for index, line in enumerate(lines):
        _draw_line(axes, line, index, len(lines))
    ticks = sorted({point[0] for line in lines for point in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [length_name(int(tick)).removesuffix(" tokens") for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0, top=103 if y_label == SCORE else None)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, handlelength=3.5, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _draw_line(axes: Any, line: Line, index: int, num_lines: int) -> None:
    """One line; later ones have smaller markers, so that what lies below them can still be seen."""
    x, y, low, high = zip(*sorted(line.points), strict=True)
    style = {
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 9 - 5 * index / num_lines,
        "linewidth": 1.6,
        "linestyle": "-" if index < _NUM_COLOURS else "--",
    }
    if low == high:
        axes.plot(x, y, label=line.label, **style)
        return
    errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
    axes.errorbar(x, y, yerr=errors, label=line.label, capsize=3, **style)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Plots need matplotlib: pip install 'retrolm[evaluation]'.") from None
    return Figure(figsize=(9.5, 4.6), layout="constrained")
