"""The index of a document: what must be known of every page, and is small: digests, checksums, lengths, spans, ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .container import Header, array_in, read_file, read_header, write_arrays
from .durable import DurableFile
from .faults import DamagedBaseError
from .manifest import DocumentEntry
from .shard import RecordShape

DIGESTS = "digests."
MEAN_KEYS = "mean_keys."


@dataclass
class Index:
    """Everything about a document's pages but their keys and values.

    Attributes:
        crc32: checksums of page records, uint32 [layers, pages].
        lengths: tokens per page, int32 [pages]. spans: character spans, int64 [pages, 2].
        token_ids: of all pages, int32 [tokens].
        digests: layer → (dtype, [pages, E]), what the method scores. mean_keys: the same for the first layers,
            as composed answers need it where the method's own digest says where a page stands in its document.
    """

    crc32: NDArray[np.uint32]
    lengths: NDArray[np.int32]
    spans: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    digests: dict[int, tuple[str, NDArray[Any]]] = field(default_factory=dict)
    mean_keys: dict[int, tuple[str, NDArray[Any]]] = field(default_factory=dict)

    def write(self, path: Path) -> DurableFile:
        """Write into a new file; returns it closed."""
        arrays: dict[str, tuple[str, NDArray[Any]]] = {
            "page_crc32": ("U32", self.crc32),
            "lengths": ("I32", self.lengths),
            "spans": ("I64", self.spans),
            "token_ids": ("I32", self.token_ids),
        }
        for front, table in ((DIGESTS, self.digests), (MEAN_KEYS, self.mean_keys)):
            arrays |= {f"{front}{layer}": value for layer, value in sorted(table.items())}
        return write_arrays(path, arrays)


class IndexFile:
    """An index on disk, read once and whole: a question needs the digests of all pages.

    Raises:
        DamagedBaseError: it isn't the file that was written, or doesn't fit its manifest entry.
    """

    def __init__(self, path: Path, entry: DocumentEntry, shape: RecordShape, file_sha256: str, what: str) -> None:
        self._what = what
        self._data = read_file(path, what)
        if hashlib.sha256(self._data.data).hexdigest() != file_sha256:
            raise DamagedBaseError(
                f"{what} is damaged: it doesn't match its checksum. Remove the document and add it again."
            )
        self._header: Header = read_header(path, what)
        self.crc32 = self._small("page_crc32", "U32", (shape.num_layers, entry.num_pages))
        self.lengths = self._small("lengths", "I32", (entry.num_pages,))
        self.spans = self._small("spans", "I64", (entry.num_pages, 2))
        self.token_ids = self._small("token_ids", "I32", (entry.num_tokens,))

    def layers(self, front: str) -> list[int]:
        """Layers that have digests (`DIGESTS`) or mean keys (`MEAN_KEYS`)."""
        names = [name.removeprefix(front) for name in self._header.arrays if name.startswith(front)]
        return sorted(int(name) for name in names if name.isdigit())

    def rows(self, front: str, layer: int) -> tuple[str, NDArray[Any]]:
        """Dtype and rows [pages, E] of one layer."""
        place = self._header.array(f"{front}{layer}", self._what)
        return place.dtype, array_in(self._data, place)

    def _small(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        place = self._header.array(name, self._what)
        if (place.dtype, place.shape) != (dtype, shape):
            raise DamagedBaseError(
                f"{self._what} doesn't fit the manifest: {name} is {place.dtype} {list(place.shape)}. Remove the "
                "document and add it again."
            )
        return array_in(self._data, place)


class TokenPages(Sequence[list[int]]):
    """Token ids page by page, made into lists only where someone looks."""

    def __init__(self, token_ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
        self._ids = token_ids
        self._ends = lengths.astype(np.int64).cumsum()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, page: Any) -> Any:
        if isinstance(page, slice):
            return [self[i] for i in range(*page.indices(len(self)))]
        index = range(len(self))[page]
        start = self._ends[index - 1] if index else 0
        return self._ids[start : self._ends[index]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[index] for index in range(len(self)))


def text_sha256(text: str) -> str:
    """Digest by which equal texts are recognised."""
    return hashlib.sha256(text.encode()).hexdigest()
