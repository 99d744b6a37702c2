"""Finding and reading data files, with an error that says how to get a missing one."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...errors import UserError

HUB = "hub"


@dataclass(frozen=True)
class Source:
    """Where the files of a data set may lie.

    Attributes:
        title: name for messages.
        places: paths below the data folder, tried in order; "{stem}" stands for the file's own name.
        how: one sentence on how to get the files.
        hub_repo: data set repository on the Hugging Face hub, used when the data folder is given as "hub".
        hub_file: file in that repository; of a .zip archive the member "data/{stem}.jsonl" is read.
    """

    title: str
    places: tuple[str, ...]
    how: str
    hub_repo: str | None = None
    hub_file: str | None = None


def find_file(source: Source, data_dir: Path | str | None, stem: str = "") -> Path:
    """Return the first existing place of a file; raises `UserError` that names the places and how to get it."""
    places = [place.format(stem=stem) for place in source.places]
    name = f"{source.title} ({stem})" if stem else source.title
    if data_dir is None:
        raise UserError(f"{name} needs a data folder that holds one of: {', '.join(places)}. {source.how}")
    if str(data_dir) == HUB:
        return _from_hub(source, stem)
    found = next((path for place in places if (path := Path(data_dir) / place).exists()), None)
    if found is None:
        raise UserError(f"{name} is not in {data_dir}. Looked for: {', '.join(places)}. {source.how}")
    return found


def has_file(source: Source, data_dir: Path | str | None, stem: str = "") -> bool:
    """Whether `find_file` would find the file in a local data folder."""
    if data_dir is None or str(data_dir) == HUB:
        return False
    return any((Path(data_dir) / place.format(stem=stem)).exists() for place in source.places)


def _from_hub(source: Source, stem: str) -> Path:
    if source.hub_repo is None or source.hub_file is None:
        raise UserError(f"{source.title} is not on the hub. {source.how}")
    from huggingface_hub import hf_hub_download

    name = source.hub_file.format(stem=stem)
    try:
        path = Path(hf_hub_download(source.hub_repo, name, repo_type="dataset"))
    except Exception as error:  # the hub client has a dozen classes for "no network" and "no such file"
        raise UserError(f"{source.hub_repo}/{name} can't be had from the hub ({error}). {source.how}") from error
    return path / f"data/{stem}.jsonl" if path.suffix == ".zip" else path


def read_rows(path: Path, needs: Collection[str] = ()) -> list[dict[str, Any]]:
    """Read a .jsonl file, or a .json file that holds a list; .gz, .zst and members of a .zip are unpacked.

    Raises `UserError` for a file that can't be unpacked or has no rows, and one that names the line that isn't JSON or
    the row that lacks a field of `needs`.
    """
    rows = list(iter_rows(path))
    if not rows:
        raise UserError(f"{path} holds no rows. Get the file again.")
    for number, row in enumerate(rows, 1):
        missing = [key for key in needs if key not in row]
        if missing:
            raise UserError(f"{path}, row {number}, has no {', '.join(missing)}. Get the file again.")
    return rows


def iter_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Like `read_rows`, row by row; there may be none."""
    for number, row in _values(path):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}, isn't a JSON object. Get the file again.")
        yield row


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Items of a list, or of lines, with their numbers."""
    if ".json" in path.suffixes:
        content = read_json(path)
        yield from enumerate(content if isinstance(content, list) else [content], 1)
    else:
        yield from ((number, _parse(line, path, number)) for number, line in _lines(path))


def read_json(path: Path) -> Any:
    """Read one JSON value from a plain or packed file."""
    with open_text(path) as file, _said_in_a_line(path):
        return _parse(file.read(), path, 1)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that aren't blank, with their numbers."""
    with open_text(path) as file, _said_in_a_line(path):
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


@contextmanager
def _said_in_a_line(path: Path) -> Iterator[None]:
    """Turn what unpacking and decoding raise into a `UserError`."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}). Get the file again.") from error


def _parse(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}, isn't JSON ({error}). Get the file again.") from error


def open_text(path: Path) -> IO[str]:
    """Open a text file for reading, unpacking .gz, .zst and archive members such as data.zip/data/x.jsonl."""
    if path.parent.parent.suffix == ".zip":
        archive = path.parent.parent
        member = path.relative_to(archive).as_posix()
        return io.TextIOWrapper(zipfile.ZipFile(archive).open(member), encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        return _open_zst(path)
    return path.open(encoding="utf-8")


def _open_zst(path: Path) -> IO[str]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path.name} is packed with zstd: pip install zstandard, or unpack it.") from error
    window = zstandard.ZstdDecompressor(max_window_size=2**31)
    return io.TextIOWrapper(window.stream_reader(path.open("rb"), closefd=True), encoding="utf-8")
