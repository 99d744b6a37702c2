"""What appears in the terminal: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)
SPEED_PERIOD_S = 600.0  # what the remaining time is worked out from; on a slow machine one chunk takes minutes
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def plain(text: str) -> str:
    """Text of others, without what a terminal would obey or can't show: control characters, broken Unicode."""
    return text.translate(_CONTROLS).encode("utf-8", "replace").decode()


def error_line(message: str) -> None:
    """Print one line of error on stderr, however long or broken the message is."""
    ERR.print(Text.assemble(("error: ", "bold red"), plain(" ".join(message.split()))), soft_wrap=True)


def note(message: str, indent: int = 0) -> None:
    """Print a remark on stderr, further lines of it indented like the first."""
    ERR.print(Padding(Text(plain(message), style="dim"), (0, 0, 0, indent), expand=False))


def print_json(value: Any) -> None:
    """Print `value` as JSON on stdout, and nothing else."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None,
               right: Sequence[int] = ()) -> None:  # fmt: skip
    """Print a table on stdout; `right` names the columns (by number) that hold figures."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    OUT.print(table)


def show_values(values: dict[str, Any], indent: int = 0) -> None:
    """Print nested values on stdout, one per line, inner ones further in."""
    for key, value in values.items():
        line = f"{key}:" if isinstance(value, dict) else f"{key}: {value}"
        OUT.print(Padding(Text(line), (0, 0, 0, indent), expand=False))
        if isinstance(value, dict):
            show_values(value, indent + 2)


@contextmanager
def waiting(message: str) -> Iterator[None]:
    """Show a spinner on stderr while something of unknown length runs."""
    if not ERR.is_terminal:
        yield
        return
    with ERR.status(Text(message, style="dim")):
        yield


@contextmanager
def progress_bar(label: str, unit: str = "pages") -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr; yields the function to call with (done, total). Silent where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
        TimeRemainingColumn(),
    )
    options: dict[str, Any] = {"transient": True, "speed_estimate_period": SPEED_PERIOD_S}
    with Progress(*columns, console=ERR, disable=not ERR.is_terminal, **options) as progress:
        task = progress.add_task(label, total=1, visible=False)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        yield update


def count(number: float) -> str:
    """A whole number with separators: 12,345."""
    return f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """Bytes in a unit that suits: 0 B, 45 MB, 1.53 GB."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    if num_bytes >= 1e6:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{num_bytes / 1e3:.0f} kB" if num_bytes >= 1e3 else f"{num_bytes:.0f} B"


def seconds(value: float) -> str:
    """Seconds in a unit that suits: 45 ms, 3.21 s, 4 min 5 s."""
    if value >= 100:
        return f"{value // 60:.0f} min {value % 60:.0f} s"
    if value >= 10:
        return f"{value:.1f} s"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def snippet(text: str, width: int) -> str:
    """The beginning of `text` on one line."""
    line = plain(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"
