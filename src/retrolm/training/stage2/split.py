"""Splitting a collection into documents to train on and documents held out, with excerpts instead of whole books."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..data.documents import read_documents
from ..data.rows import Document, RowCounts, content_hash
from .asking import AskingDocuments

TRAIN_FILE = "train.jsonl.gz"
HELD_OUT_FILE = "held_out.jsonl.gz"


def split_documents(
    source: Path,
    out: Path,
    num_held_out: int,
    excerpt_chars: int,
    held_out_chars: int,
    asking: AskingDocuments | None = None,
) -> dict[str, dict[str, int]]:
    """Write `train.jsonl.gz` and `held_out.jsonl.gz` into `out`; the same collection gives the same files.

    Args:
        source: as for `read_documents`.
        num_held_out: documents held out: those of the smallest content hash, which says nothing about a text.
        excerpt_chars, held_out_chars: characters kept of each document, from the first line break past a tenth of it
            (front matter is left out); 0 = the whole.
        asking: documents that end in questions, spread among those to train on.

    Returns:
        Documents and characters by file.

    Raises:
        UserError: nothing readable, or no more documents than are held out.
    """
    ranked = sorted(content_hash(document.text) for document in read_documents(source, RowCounts()))
    if len(ranked) <= num_held_out:
        raise UserError(f"{source} has {len(ranked)} documents; {num_held_out} held out leave none to train on.")
    held_out = frozenset(ranked[:num_held_out])
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, wanted, chars in ((TRAIN_FILE, False, excerpt_chars), (HELD_OUT_FILE, True, held_out_chars)):
        documents = read_documents(source, RowCounts())
        part = (document for document in documents if (content_hash(document.text) in held_out) == wanted)
        asked = None if wanted else asking
        found[name] = _write(out / name, _excerpts(part, chars, len(ranked) - num_held_out, asked))
    return found


def _excerpts(
    documents: Iterable[Document], chars: int, num_documents: int, asking: AskingDocuments | None
) -> Iterator[Document]:
    for number, document in enumerate(documents):
        yield Document(document.title, excerpt(document.text, chars))
        if asking is not None:
            yield from asking.after(document, number, num_documents)


def excerpt(text: str, chars: int) -> str:
    """`chars` characters from the first line break past a tenth of the text; the whole if it is no longer."""
    if not chars or len(text) <= chars:
        return text
    start = min(len(text) // 10, len(text) - chars)
    start = text.find("\n", start, len(text) - chars) + 1 or start
    return text[start : start + chars]


def _write(path: Path, documents: Iterable[Document]) -> dict[str, int]:
    part = path.with_suffix(".part")
    try:
        counts = _write_rows(part, documents)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    part.replace(path)
    return counts


def _write_rows(path: Path, documents: Iterable[Document]) -> dict[str, int]:
    counts = {"documents": 0, "chars": 0, "turns": 0}
    # Without name and time in its head the file depends on the texts alone.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        for document in documents:
            row: dict[str, Any] = {"title": document.title, "text": document.text}
            row |= {"turns": document.turns} if document.turns else {}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            counts["documents"] += 1
            counts["chars"] += len(document.text)
            counts["turns"] += len(document.turns)
    return counts
