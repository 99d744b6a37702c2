"""Result files: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import UserError


def check_writable(path: Path | None) -> None:
    """Raise `UserError` if `path` can't become a file, before any work is done; None is fine."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name a file for the figures.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Make it first, or name another file.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"The folder {folder} can't be written to. Name a file elsewhere.")


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` in one step; an error leaves what was there before."""
    descriptor, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
