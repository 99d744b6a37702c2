"""Readers of long documents: folders of text files and JSON-lines collections of books."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from .lines import json_lines, open_bytes
from .rows import Document, RowCounts, checked

TEXT_SUFFIXES = (".txt", ".md")


def read_documents(path: Path, counts: RowCounts) -> Iterator[Document]:
    """Yield documents, one in memory at a time, in a fixed order.

    `path` is a folder of .txt and .md files (searched deeply), one such file, or JSON lines (.jsonl, also .gz and
    .zst) of {"text", "title"?}. Empty and repeated documents are skipped with a count. Raises `UserError` if nothing
    usable is found.
    """
    yield from checked(_documents(path, counts), counts, str(path))


def _documents(path: Path, counts: RowCounts) -> Iterator[Document]:
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES):
            yield _text_file(file)
    elif path.suffix in TEXT_SUFFIXES:
        yield _text_file(path)
    elif ".jsonl" in path.suffixes:
        for row in json_lines(path, counts):
            text, title = row.get("text"), row.get("title")
            yield Document(title if isinstance(title, str) else "", text if isinstance(text, str) else "")
    else:
        raise UserError(f"{path} is no document source. Allowed: a folder, .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst.")


def _text_file(path: Path) -> Document:
    with open_bytes(path) as stream:
        return Document(path.stem, stream.read().decode("utf-8", errors="replace").replace("\x00", " ").strip())
