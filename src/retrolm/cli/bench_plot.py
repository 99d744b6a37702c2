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
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    figure.suptitle(title)
    for axes, (key, label, fits, factor) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _draw(axes, [row for row in rows if fits(row) and key in row.figures], key, factor)
        axes.set(xlabel="tokens", ylabel=label, xscale="log", ylim=(0, None))
        axes.set_xscale("log", base=2)
    figure.savefig(target, dpi=120)


def _draw(axes: Any, rows: Sequence[Row], key: str, factor: float) -> None:
    for name in dict.fromkeys((row.what, row.batch) for row in rows):
        line = sorted((row.num_tokens, row.figures[key] * factor) for row in rows if (row.what, row.batch) == name)
        label = name[0] if name[1] == 1 else f"{name[0]}, batch {name[1]}"
        axes.plot(*zip(*line, strict=True), marker="o", label=label)
    if rows:
        axes.legend(fontsize=8)
