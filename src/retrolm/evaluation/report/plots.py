"""The report's plots, as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ..averages import mean
from .costs import memory_kind, memory_name
from .results import Column, Results, family
from .table import BLOCKS, cells_interval, length_name

_MARKERS = "osD^vP*X<>"
_NUM_COLOURS = 10  # of the colour cycle; lines beyond it are dashed
_CLOSE = 1.2  # places nearer to each other by this factor share a name
_NAME_INCHES = 0.2  # height of a name below a panel
SCORE = "score (of 100, mean over tasks)"


@dataclass(frozen=True)
class Plot:
    """A picture: its name (a file name without ending), what it shows, and the PNG itself."""

    name: str
    title: str
    png: bytes


@dataclass(frozen=True)
class Line:
    """Points of one method: x, mean, and the interval's ends where there is one.

    Attributes:
        prefill: kind of prefill, whose panel the line is drawn in where there are several; None = in all of them.
    """

    label: str
    points: list[tuple[float, float, float, float]]
    prefill: str | None = None


def apart(ticks: list[float]) -> list[float]:
    """Ascending places on a logarithmic axis whose names don't run into each other: of close ones, the last."""
    return [tick for tick, after in zip(ticks, [*ticks[1:], math.inf], strict=False) if after / max(tick, 1) > _CLOSE]


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
    places: list[tuple[float, int | None]] = [(float(n), n) for n in comparable_lengths(results, name)]
    return [
        Line(column.name, _points(results, column, name, places, value), None if column.is_full else column.prefill)
        for column in results.columns()
    ]


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
    data = io.BytesIO()
    drawn(title, x_label, y_label, lines).savefig(data, format="png", dpi=130)
    return [Plot(name, title, data.getvalue())]


def drawn(title: str, x_label: str, y_label: str, lines: list[Line]) -> Any:
    """A matplotlib figure of the lines, in panels by kind of prefill where they are many."""
    panels = _panels(lines)
    alone, rows = len(panels) == 1, max(len(shown) for _, shown in panels)
    figure = _figure((9.5, 4.6) if alone else (6.5 * len(panels), 4.6 + _NAME_INCHES * rows))
    beside, below = ("center left", (1.02, 0.5)), ("upper left", (0.0, -0.12))
    place, anchor = beside if alone else below
    figure.suptitle(title)
    ticks = apart(sorted({point[0] for line in lines for point in line.points}))
    for axes, (heading, shown) in zip(_axes(figure, len(panels)), panels, strict=True):
        for index, line in enumerate(shown):
            _draw_line(axes, line, index, len(shown))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [length_name(int(tick)).removesuffix(" tokens") for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0, top=_top(lines) if y_label == SCORE else None)
        axes.set(title=heading, xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, handlelength=3.5, frameon=False, loc=place, bbox_to_anchor=anchor)
    return figure


def _top(lines: list[Line]) -> float:
    """Upper end of the axis of scores: 100, or less where all are low."""
    return min(103.0, 1.1 * max(point[3] for line in lines for point in line.points))


def _panels(lines: list[Line]) -> list[tuple[str, list[Line]]]:
    """Lines by panel, with its heading: all in one, or by kind of prefill where colours don't tell them apart."""
    kinds = [kind for kind in BLOCKS if any(line.prefill == kind for line in lines)]
    if len(lines) <= _NUM_COLOURS or len(kinds) < 2:
        return [("", lines)]
    return [(BLOCKS[kind], [line for line in lines if line.prefill in (None, kind)]) for kind in kinds]


def _axes(figure: Any, count: int) -> list[Any]:
    """So many panels side by side, of one scale."""
    found: list[Any] = figure.subplots(1, count, sharey=True, squeeze=False)[0].tolist()
    return found


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


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Plots need matplotlib: pip install 'retrolm[evaluation]'.") from None
    return Figure(figsize=size, layout="constrained")
