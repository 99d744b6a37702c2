"""`retrolm report`: tables and plots from rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `retrolm eval` wrote rows to.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
) -> None:
    """Turn rows into report.md, report.html (one self-contained page), CSV files and PNG plots."""
    from ..evaluation.report.write import write_report

    for path in write_report(folders, out):
        print(path)
