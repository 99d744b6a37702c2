"""What readers yield: questions with passages, and long documents; rows that can't be used are counted by reason."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from ...errors import UserError


@dataclass(frozen=True)
class Passage:
    """A stretch of text that is retrieved as a whole; `title` may be empty."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class PairRow:
    """One question with its positive passages, hard negatives (may be empty) and answer strings (may be empty)."""

    qid: str
    source: str
    query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    answers: tuple[str, ...] = ()
    bm25_rank: int | None = None


@dataclass(frozen=True)
class Document:
    """A long coherent text; `turns` are questions about it with their answers, which follow it."""

    title: str
    text: str
    turns: tuple[tuple[str, str], ...] = ()


Row = TypeVar("Row", PairRow, Document)
Item = TypeVar("Item")


@dataclass
class RowCounts:
    """How many rows of one source were kept, and how many skipped for which reason."""

    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def skip(self, reason: str) -> None:
        """Count one skipped row."""
        self.skipped[reason] += 1


def content_hash(text: str) -> int:
    """Return a 64-bit hash of a text that ignores case and white space; the same in every process."""
    canonical = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "big")


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def checked(rows: Iterable[Row], counts: RowCounts, origin: str) -> Iterator[Row]:
    """Pass on usable rows once each, counting them; empty and duplicate rows are skipped with a count.

    Raises `UserError` after the last row if none was usable.
    """
    seen: set[int] = set()
    for row in rows:
        problem = _problem(row, seen)
        if problem:
            counts.skip(problem)
            continue
        counts.kept += 1
        yield row
    if not counts.kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.skipped.most_common()) or "no rows at all"
        raise UserError(f"{origin} has no usable row ({reasons}). Check the path and the format.")


def _problem(row: PairRow | Document, seen: set[int]) -> str | None:
    if isinstance(row, Document):
        key, empty = content_hash(row.text), not row.text.strip()
    else:
        if not row.positives:
            return "without a positive"
        key = content_hash("\n".join([row.query, *(p.text for p in row.positives)]))
        empty = not row.query.strip() or any(not p.text.strip() for p in row.positives)
    if empty:
        return "empty"
    if key in seen:
        return "duplicate"
    seen.add(key)
    return None
