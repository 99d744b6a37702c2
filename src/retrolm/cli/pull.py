"""`retrolm pull`: fetch a demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from .options import JsonFlag
from .screen import ERR, note, print_json, size


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a demo model (see `retrolm models`).")],
    as_json: JsonFlag = False,
) -> None:
    """Fetch a demo model into the cache folder, check it and convert it once; goes on where it was stopped."""
    from ..engine.catalogue import find_entry
    from ..engine.pull import is_pulled

    entry = find_entry(name)
    was_here = is_pulled(name)
    folder = fetch_model(name)
    if as_json:
        print_json({
            "name": name,
            "folder": str(folder),
            "was_here": was_here,
            "licence": entry.licence,
            "licence_note": entry.licence_note,
        })  # fmt: skip
        return
    print(f"{name} {'was here already' if was_here else 'is ready'}: {folder}")
    note(f"Licence: {entry.licence}. {entry.licence_note}")


def fetch_model(name: str) -> Path:
    """Pull a demo model with a progress bar, or return its folder at once if it is here."""
    from ..engine.pull import pull
    from ..engine.quiet import silence_libraries

    silence_libraries()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as progress:
        task = progress.add_task(name, total=None)

        def update(step: str, done: int, total: int) -> None:
            progress.update(task, description=f"{name}: {step}", completed=done, total=total or None)

        return pull(name, progress=update)


def fetch_if_missing(model: str) -> None:
    """Pull `model` if it is the name of a demo model that isn't here."""
    from ..engine.catalogue import CATALOGUE
    from ..engine.pull import is_pulled

    if model in CATALOGUE and not is_pulled(model):
        note(f"Fetching {model} ({size(CATALOGUE[model].download_bytes)}, licence {CATALOGUE[model].licence}) …")
        fetch_model(model)
