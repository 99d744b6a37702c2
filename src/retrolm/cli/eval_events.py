"""Progress of an evaluation on stderr: one line per finished cell, and a bar where stderr is a terminal."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..evaluation.rows import cell_name
from ..evaluation.runner import Events
from .screen import ERR, seconds


class EvalScreen(Events):
    """Shows a run while it goes. Use as a context manager."""

    def __init__(self, num_cells: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} samples"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal)
        self._bar = self._progress.add_task("", total=None)
        self._num_cells = num_cells
        self._ended = 0

    def __enter__(self) -> EvalScreen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def cell_begins(self, name: str, num_done: int, num_samples: int) -> None:
        """See `Events`."""
        self._progress.reset(self._bar, description=name, total=num_samples, completed=num_done)

    def samples_done(self, num_done: int, num_samples: int) -> None:
        """See `Events`."""
        self._progress.update(self._bar, completed=num_done)

    def cell_ends(self, cell: dict[str, Any]) -> None:
        """See `Events`."""
        self._ended += 1
        ERR.print(Text(f"[{self._ended}/{self._num_cells}] {cell_line(cell)}"), soft_wrap=True)


def cell_line(cell: dict[str, Any]) -> str:
    """A finished cell in one line."""
    low, high = cell["score_ci"]
    parts = [f"{cell_name(cell)}: {100 * cell['score']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
    parts.append(f"{cell['num_samples']} samples")
    if cell["total_s"] is not None:
        parts.append(f"{seconds(cell['total_s'])} each")
    if cell["num_failed"]:
        parts.append(f"{cell['num_failed']} FAILED")
    if cell["beyond_window"]:
        parts.append("beyond the model's window")
    return ", ".join(parts)
