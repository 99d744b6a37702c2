"""The figures of a shape as a plot: reading speed, time per token and memory against length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..engine.shape_bench import Row

PANELS = (
    ("tokens_per_s", "reading, tokens/s", lambda row: "seconds" in row.figures, 1.0),
    ("s_per_token", "ms per generated token", lambda row: "decode" in row.what, 1e3),
    ("peak_reserved_bytes", "peak reserved memory, GB", lambda row: "seconds" in row.figures, 1e-9),
)


def draw_rows(rows: Sequence[Row], title: str, target: Path) -> None:
    """Draw a panel per kind of figure, a line per measurement and batch; raises `UserError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Drawing a plot needs matplotlib. Install retrolm[evaluation], or leave out --plot.") from None
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys((row.what, row.batch) for row in rows))}
    panels = [(panel, [row for row in rows if panel[2](row) and panel[0] in row.figures]) for panel in PANELS]
    panels = [(panel, fitting) for panel, fitting in panels if fitting]
    figure = Figure(figsize=(5 * max(len(panels), 1), 4.5), layout="constrained")
    figure.suptitle(title)
    for index, ((key, label, _, factor), fitting) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), index)
        _draw(axes, fitting, key, factor, colours)
        axes.set(xlabel="tokens", ylabel=label, ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(_tokens)
    figure.savefig(target, dpi=120)


def _tokens(number: float, _: float) -> str:
    return f"{number / 2**10:g}K" if number < 2**20 else f"{number / 2**20:g}M"


def _draw(axes: Any, rows: Sequence[Row], key: str, factor: float, colours: dict[tuple[str, int], str]) -> None:
    for name in dict.fromkeys((row.what, row.batch) for row in rows):
        line = sorted((row.num_tokens, row.figures[key] * factor) for row in rows if (row.what, row.batch) == name)
        label = name[0] if name[1] == 1 else f"{name[0]}, batch {name[1]}"
        axes.plot(*zip(*line, strict=True), marker="o", label=label, color=colours[name])
    axes.legend(fontsize=8)
