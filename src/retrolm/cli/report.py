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
    matrix: Annotated[
        list[str],
        typer.Option("--matrix", help="Columns of one table of all methods with times and memory, as NAME=TASK,…; may "
                     "be repeated.", show_default=False),
    ] = [],  # noqa: B006
    costs: Annotated[
        list[Path],
        typer.Option("--costs", help="Folder of rows to take that table's times and memory from; may be repeated.",
                     show_default="DIR"),
    ] = [],  # noqa: B006
) -> None:  # fmt: skip
    """Turn rows into report.md, report.html (one self-contained page), CSV files and PNG plots."""
    groups, columns = parse_groups("--average", average, 2), parse_groups("--matrix", matrix, 1)
    if costs and not columns:
        raise UserError("--costs needs --matrix. For example: --matrix needle=ruler/niah_single_2")
    from ..evaluation.report.matrix import Matrix
    from ..evaluation.report.results import load_results
    from ..evaluation.report.write import write_report

    table = Matrix(columns, load_results(costs) if costs else None) if columns else None
    for path in write_report(folders, out, groups, table):
        print(path)


def parse_groups(option: str, texts: list[str], least: int) -> dict[str, tuple[str, ...]]:
    """Turn ["NAME=TASK,TASK", …] into groups of tasks; raises `UserError` for an unknown task or fewer than `least`."""
    from ..evaluation.tasks import expand_tasks

    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, tasks = text.partition("=")
        members = tuple(expand_tasks(task.strip() for task in tasks.split(",") if task.strip()))
        if not name or len(members) < least:
            raise UserError(
                f"{option} needs NAME=TASK,TASK with {least} or more tasks, got {text!r}. For example: "
                f"{option} qa=longdoc/xquad,longdoc/musique"
            )
        found[name] = members
    return found
