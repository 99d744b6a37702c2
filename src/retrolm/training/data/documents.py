"""Readers of long documents: text files, JSON-lines collections, Parquet files, and folders of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from .lines import json_lines, open_bytes
from .rows import Document, RowCounts, checked

TEXT_SUFFIXES = (".txt", ".md")
_BATCH_ROWS = 64


def read_documents(path: Path, counts: RowCounts) -> Iterator[Document]:
    """Yield documents, one in memory at a time, in a fixed order.

    `path` is a .txt or .md file, JSON lines (.jsonl, also .gz and .zst) of {"text", "title"?}, a .parquet file with a
    column `text`, or a folder of these (searched deeply). Empty and repeated documents are skipped with a count.
    Raises `UserError` if nothing usable is found.
    """
    yield from checked(_documents(path, counts), counts, str(path))


def _documents(path: Path, counts: RowCounts) -> Iterator[Document]:
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and _is_source(p)):
            yield from _documents(file, counts)
    elif path.suffix in TEXT_SUFFIXES:
        yield _text_file(path)
    elif ".jsonl" in path.suffixes:
        for row in json_lines(path, counts):
            yield as_document(row)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise UserError(
            f"{path} is no document source. Allowed: .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, or a folder."
        )


def as_document(row: Mapping[str, Any]) -> Document:
    """The document in a row {"text", "title"?, "turns"?}; empty where the text is no text."""
    text, title = row.get("text"), row.get("title")
    return Document(title if isinstance(title, str) else "", text if isinstance(text, str) else "", _turns(row))


def _turns(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Questions and answers of a row, as far as they are pairs of texts."""
    found = row.get("turns")
    pairs = [tuple(turn) for turn in found if isinstance(turn, list)] if isinstance(found, list) else []
    return tuple(pair for pair in pairs if len(pair) == 2 and all(isinstance(part, str) for part in pair))


def _is_source(path: Path) -> bool:
    return path.suffix in (*TEXT_SUFFIXES, ".parquet") or ".jsonl" in path.suffixes


def _parquet_rows(path: Path) -> Iterator[Document]:
    if not path.is_file():
        raise UserError(f"No file {path}. Give the path of a data file, relative to the data root.")
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"Reading {path} needs pyarrow: pip install pyarrow.") from error
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in ("title", "text") if name in file.schema_arrow.names]
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            yield from map(as_document, batch.to_pylist())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}).") from error


def _text_file(path: Path) -> Document:
    with open_bytes(path) as stream:
        return Document(path.stem, stream.read().decode("utf-8", errors="replace").replace("\x00", " ").strip())
