"""Texts kept on disk while a pool is prepared, so that corpora larger than memory can be read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator

from .rows import Passage, content_hash


class PassageSpool:
    """Different passages in order of arrival, in a temporary file; only their hashes and places are in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the spool
        self._places: list[int] = []
        self._index_of: dict[int, int] = {}
        self.sources: list[str] = []
        self.hashes: list[int] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, passage: Passage, source: str) -> int:
        """Store a passage unless an equal text is stored already; returns its index."""
        key = content_hash(passage.text)
        known = self._index_of.get(key)
        if known is not None:
            return known
        self._places.append(self._file.seek(0, 2))
        self._file.write(json.dumps([passage.text, passage.title]).encode() + b"\n")
        self._index_of[key] = len(self._places) - 1
        self.sources.append(source)
        self.hashes.append(key)
        return len(self._places) - 1

    def __iter__(self) -> Iterator[Passage]:
        self._file.seek(0)
        for line in self._file:
            text, title = json.loads(line)
            yield Passage(text, title)

    def __getitem__(self, index: int) -> Passage:
        self._file.seek(self._places[index])
        text, title = json.loads(self._file.readline())
        return Passage(text, title)
