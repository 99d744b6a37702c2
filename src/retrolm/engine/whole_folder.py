"""Folders for results: refused before the work where they can't be, and written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


def require_folder(path: Path) -> None:
    """Raise `UserError` if `path` can't be or become a folder to write to, before any work is done."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{place} is a file, where a folder is needed. Name another --out.")
    if not os.access(place, os.W_OK):
        raise UserError(f"The folder {place} can't be written to. Name another --out.")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into; when the block ends it takes the place of `folder`, and of what stood there."""
    part, old = (folder.with_name(folder.name + ending) for ending in (".part", ".old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)
