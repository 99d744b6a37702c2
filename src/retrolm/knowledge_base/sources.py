"""What is added to a base: texts, files, and the files in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..engine.text_files import READERS, read_text_file, text_of
from ..errors import UserError

SUFFIXES = (".txt", ".md", *READERS)


@dataclass(frozen=True)
class Source:
    """One text to add: its name in the base and the file it comes from ("" = none)."""

    name: str
    path: str
    text: str


def file_source(path: str | Path, name: str | None = None) -> Source:
    """A file; raises `UserError` if it can't be read as text."""
    text = read_text_file(path)
    return Source(name or _readable(path), _readable(Path(path).absolute()), text)


def text_source(text: str, name: str) -> Source:
    """A text as it stands, line ends as in files; raises `UserError` if it is empty."""
    return Source(name, "", text_of(text.encode("utf-8", "replace"), name=name, suffix=""))


def _readable(path: str | Path) -> str:
    """A path as text; bytes of its name that are no UTF-8 can't stand in a manifest."""
    return os.fsencode(path).decode("utf-8", "replace")


def files_in(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Files as they are given, and those in given folders that can be read as text, sorted.

    Raises:
        UserError: a folder without any.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise UserError(f"The folder {path} holds no file that can be read ({', '.join(SUFFIXES)}).")
        yield from found
