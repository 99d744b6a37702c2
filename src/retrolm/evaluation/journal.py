"""A file of JSON lines that survives being killed: appended line by line, each on the disk before the next begins."""

from __future__ import annotations

import fcntl
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from ..errors import UserError


class Journal:
    """Rows by their "key", kept in a file; a later row with the same key replaces an earlier one.

    Opening repairs a last line that was torn by a kill. Only one process may hold a journal.

    Raises:
        UserError: another process holds it, or it holds a line (the last one aside) that is no row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(
                f"{path} is in use by another run. Wait for it, or give another folder with --out."
            ) from None
        _cut_torn_line(self._file.fileno(), path)
        self.rows = {row["key"]: row for row in read_lines(path, needs=("key",))}

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; it is on the disk when this returns."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows[row["key"]] = row

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_lines(path: Path, needs: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON lines file (`.gz` and `.xz` too); a last line without its end is left out.

    Raises `UserError` for a file that can't be unpacked, and one that names a line that isn't a JSON object with all
    keys of `needs`.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                yield _parsed(line, path, number, needs)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} can't be unpacked ({error}). Get the file again.") from None


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    return lzma.open(path) if path.suffix == ".xz" else path.open("rb")


def _parsed(line: bytes, path: Path, number: int, needs: Collection[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}, isn't JSON ({error}). Remove the line, then run again.") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}, isn't a JSON object. Remove the line, then run again.")
    missing = [key for key in needs if key not in row]
    if missing:
        raise UserError(f"{path}, line {number}, has no {', '.join(missing)}. Remove the line, then run again.")
    return row


def _cut_torn_line(descriptor: int, path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(descriptor, data.rfind(b"\n") + 1)
        os.fsync(descriptor)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON lines file in one step."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step: there is the old one or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
