"""Opening text files, plain or compressed, and iterating over the JSON values in them without reading them whole."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ...errors import UserError
from .rows import RowCounts

_WINDOW_BYTES = 2**27  # zstd files written with --long=27
_CHUNK_CHARS = 1 << 20


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading; `.gz` and `.zst` are decompressed on the fly. Raises `UserError` if it isn't there."""
    if not path.is_file():
        raise UserError(f"No file {path}. Give the path of a data file, relative to the data root.")
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return _open_zstd(path)
    return path.open("rb")


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"Reading {path} needs zstandard: pip install 'retrolm[training]'.") from error
    reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).stream_reader(path.open("rb"), closefd=True)
    return cast(BinaryIO, io.BufferedReader(reader))


def json_lines(path: Path, counts: RowCounts) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; lines that aren't JSON objects are counted as skipped."""
    with open_bytes(path) as stream:
        for line in _readable(stream, path, counts):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:  # includes bytes that aren't UTF-8
                counts.skip("not JSON")
                continue
            if isinstance(value, dict):
                yield value
            else:
                counts.skip("not a JSON object")


def _readable(stream: BinaryIO, path: Path, counts: RowCounts) -> Iterator[bytes]:
    """Yield lines up to the end or to the place where a compressed file is damaged, which is counted."""
    lines = iter(stream)
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except Exception as error:
            if not _is_damage(error):
                raise
            counts.skip(f"damaged file {path.name}")
            return
        yield line


def _is_damage(error: Exception) -> bool:
    return isinstance(error, EOFError | gzip.BadGzipFile) or type(error).__name__ in {"ZstdError", "error"}


def json_array(path: Path, counts: RowCounts) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that holds one JSON array, keeping about one object in memory.

    Raises `UserError` if the file doesn't begin with `[` or breaks off inside an object.
    """
    with open_bytes(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="replace")
        buffer = text.read(_CHUNK_CHARS).lstrip()
        if not buffer.startswith("["):
            raise UserError(f"{path} is not a JSON array. Allowed: a file that begins with '['.")
        yield from _elements(text, buffer[1:], path, counts)


def _elements(text: io.TextIOWrapper, buffer: str, path: Path, counts: RowCounts) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    while True:
        buffer = buffer.lstrip(" \t\r\n,")
        if buffer.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(buffer)
        except ValueError as error:
            more = text.read(max(_CHUNK_CHARS, len(buffer)))  # doubling keeps long objects linear in time
            if not more:
                raise UserError(f"{path} breaks off inside its JSON array. Write the file again.") from error
            buffer += more
            continue
        buffer = buffer[end:]
        if isinstance(value, dict):
            yield value
        else:
            counts.skip("not a JSON object")
