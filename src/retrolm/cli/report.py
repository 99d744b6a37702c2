"""`retrolm report`: tables and plots from rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError


def command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `retrolm eval` wrote rows to.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    average: Annotated[
        list[str],
        typer.Option("--average", help="Tasks to average over beside the known groups, as NAME=TASK,TASK,…; may be "
                     "repeated.", show_default=False),
    ] = [],  # noqa: B006
) -> None:  # fmt: skip
    """Turn rows into report.md, report.html (one self-contained page), CSV files and PNG plots."""
    groups = parse_averages(average)
    from ..evaluation.report.write import write_report

    for path in write_report(folders, out, groups):
        print(path)


def parse_averages(texts: list[str]) -> dict[str, tuple[str, ...]]:
    """Turn ["NAME=TASK,TASK", …] into groups of tasks; raises `UserError` for an unknown task or a lack of two."""
    from ..evaluation.tasks import expand_tasks

    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, tasks = text.partition("=")
        members = tuple(expand_tasks(task.strip() for task in tasks.split(",") if task.strip()))
        if not name or len(members) < 2:
            raise UserError(
                f"--average needs NAME=TASK,TASK with two tasks or more, got {text!r}. For example: "
                "--average qa=longdoc/xquad,longdoc/musique"
            )
        found[name] = members
    return found
