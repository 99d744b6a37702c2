"""Where a run's figures go: a file of JSON lines, and trackers through accelerate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..errors import UserError

LOG_FILE = "log.jsonl"
Log = Callable[[dict[str, Any]], None]


class RunLog:
    """Writes rows on the main process; the other processes are silent.

    Args:
        folder: gets `log.jsonl`. name: the project's name for trackers.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, name: str) -> None:
        self._accelerator, self._name = accelerator, name
        self._path = folder / LOG_FILE

    def begin(self, step: int, recipe: dict[str, Any]) -> None:
        """Start at a step: rows of later steps, which a broken-off run left, are dropped."""
        if self._accelerator.trackers or self._accelerator.log_with:
            self._accelerator.init_trackers(self._name, config=dict(_flat(recipe)))
        if self._accelerator.is_main_process and self._path.is_file():
            kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            part = self._path.with_suffix(".part")
            part.write_text("".join(line + "\n" for line in kept if step), encoding="utf-8")
            part.replace(self._path)

    def record(self, row: dict[str, Any]) -> None:
        """Write one row; it holds "step"."""
        self._accelerator.log(dict(_flat(row)), step=row["step"])
        if not self._accelerator.is_main_process:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def end(self) -> None:
        """Let trackers finish."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


def require_trackers(accelerator: Accelerator, wanted: Sequence[Any]) -> None:
    """Raise `UserError` for trackers whose packages aren't installed, which accelerate would leave out."""
    if missing := len(wanted) - len(accelerator.log_with or ()):
        names = ", ".join(str(name) for name in wanted)
        raise UserError(f"{missing} of these trackers can't be used here: {names}. Install their packages.")


def _step(line: str) -> float:
    """Step of a row; a line cut off by a kill is after everything."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values as (dotted key, plain value), as trackers take them."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found.append((prefix + key, json.dumps(value)))
        elif value is not None:
            found.append((prefix + key, value))
    return found
