"""The prepared pool: all texts as token arrays in one folder, from which samples are assembled without tokenising.

Files: `manifest.json` (counts, licences, settings, sha256 of every file; written last), `queries.json.gz` (question
strings), `common_words.json`, and `.npy` arrays. Token arrays hold indices into `vocab.npy`, the ids in use, which
fits 16 bits for English text whatever the tokenizer's vocabulary.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from .encoder import tokenizer_fingerprint
from .sample import TokenArray

FORMAT_VERSION = 1
TRAIN, DEV = 0, 1
SPLITS = {"train": TRAIN, "dev": DEV}
TOKEN_ARRAYS = ("passages", "titles", "books")
ARRAYS = (
    *TOKEN_ARRAYS,
    "vocab",
    "passage_offsets",
    "passage_source",
    "passage_split",
    "passage_sentences",
    "title_offsets",
    "book_offsets",
    "book_split",
    "book_sentences",
    "row_source",
    "row_split",
    "row_positives",
    "row_positive_offsets",
    "row_answers",
    "row_cuts",
    "row_negatives",
    "row_negative_offsets",
)


@dataclass(frozen=True)
class QuestionRow:
    """One question of the pool. `positives` and `negatives` are passage indices.

    `answers` gives, per positive, the token span (start, end) of an answer in the passage, or (-1, -1).
    `cut` is the token span of the sentence that the question quotes from its first positive, or (-1, -1).
    `source` names where the question comes from.
    """

    query: str
    positives: NDArray[np.integer[Any]]
    answers: NDArray[np.integer[Any]]
    negatives: NDArray[np.integer[Any]]
    cut: tuple[int, int]
    source: str


class TokenPool:
    """Read access to a prepared pool folder; arrays are memory-mapped, so copies in worker processes cost nothing.

    Raises `UserError` if the folder is incomplete, damaged, of another format version or for another tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Any | None = None, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        if tokenizer is not None and self.manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
            raise UserError(f"The pool {folder} was prepared for another tokenizer. Prepare it again for this model.")
        if verify:
            _check_hashes(folder, self.manifest["files"])
        # A plain view of the mapped memory: slicing np.memmap itself is several times slower.
        self.arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS}
        self.queries: list[str] = json.loads(gzip.decompress((folder / "queries.json.gz").read_bytes()))
        self.common_words = frozenset(json.loads((folder / "common_words.json").read_text(encoding="utf-8")))
        self.source_names: list[str] = self.manifest["source_names"]
        self._vocab = self.arrays["vocab"]

    @property
    def num_passages(self) -> int:
        """Number of passages."""
        return len(self.arrays["passage_offsets"]) - 1

    @property
    def num_books(self) -> int:
        """Number of books."""
        return len(self.arrays["book_offsets"]) - 1

    def passage(self, index: int) -> TokenArray:
        """Return the ids of a passage, int32."""
        return self._tokens("passages", *self._bounds("passage_offsets", index))

    def title(self, index: int) -> TokenArray:
        """Return the ids of a passage's title, int32, empty if it has none."""
        return self._tokens("titles", *self._bounds("title_offsets", index))

    def passage_sentences(self, index: int) -> list[int]:
        """Return the token offsets within a passage at which its sentences begin; the first is 0."""
        start, end = self._bounds("passage_offsets", index)
        inside = self._between("passage_sentences", start, end)
        return [0, *(offset - start for offset in inside.tolist() if offset > start)]

    def book_sentences(self, book: int) -> NDArray[np.int64]:
        """Return the token offsets in the book stream at which the sentences of a book begin, int64, ascending."""
        return self._between("book_sentences", *self._bounds("book_offsets", book))

    def book_tokens(self, start: int, end: int) -> TokenArray:
        """Return the ids of a stretch of the book stream, int32."""
        return self._tokens("books", start, end)

    def row(self, index: int) -> QuestionRow:
        """Return one question."""
        first, last = self._bounds("row_positive_offsets", index)
        low, high = self._bounds("row_negative_offsets", index)
        cut = self.arrays["row_cuts"][index]
        return QuestionRow(
            query=self.queries[index],
            positives=self.arrays["row_positives"][first:last],
            answers=self.arrays["row_answers"][first:last],
            negatives=self.arrays["row_negatives"][low:high],
            cut=(int(cut[0]), int(cut[1])),
            source=self.source_names[int(self.arrays["row_source"][index])],
        )

    def rows_of(self, source: str, split: str) -> NDArray[np.int64]:
        """Return the indices of the questions of a source in a split, int64, ascending."""
        if source not in self.source_names:
            return np.zeros(0, dtype=np.int64)
        is_source = self.arrays["row_source"] == self.source_names.index(source)
        return np.flatnonzero(is_source & (self.arrays["row_split"] == SPLITS[split]))

    def books_of(self, split: str) -> NDArray[np.int64]:
        """Return the indices of the books of a split, int64, ascending."""
        return np.flatnonzero(self.arrays["book_split"] == SPLITS[split])

    def _bounds(self, name: str, index: int) -> tuple[int, int]:
        offsets = self.arrays[name]
        return int(offsets[index]), int(offsets[index + 1])

    def _between(self, name: str, start: int, end: int) -> NDArray[np.int64]:
        offsets = self.arrays[name]
        bounds = np.array([start, end], dtype=offsets.dtype)  # another dtype would convert the whole array
        low, high = np.searchsorted(offsets, bounds)
        return np.asarray(offsets[low:high], dtype=np.int64)

    def _tokens(self, name: str, start: int, end: int) -> TokenArray:
        tokens: TokenArray = self._vocab[self.arrays[name][start:end]]
        return tokens


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a pool's manifest; raises `UserError` if there is none or it is of another format version."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder} is no prepared pool (no manifest.json). Make one with `retrolm data stage1`.")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT_VERSION:
        raise UserError(
            f"The pool {folder} has format {manifest.get('format')!r}, not {FORMAT_VERSION}. Prepare it again."
        )
    return manifest


def _check_hashes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise UserError(f"{path} is missing or damaged. Prepare the pool again.")


def write_pool(
    folder: Path,
    arrays: Mapping[str, NDArray[Any]],
    queries: Sequence[str],
    common: Sequence[str],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a pool folder, every file atomically and the manifest last; returns the manifest as written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    contents = {f"{name}.npy": _npy_bytes(arrays[name]) for name in ARRAYS}
    contents["queries.json.gz"] = gzip.compress(_json_bytes(list(queries)), mtime=0)
    contents["common_words.json"] = _json_bytes(list(common))
    for name, content in contents.items():
        _write_atomically(folder / name, content)
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    complete = {"format": FORMAT_VERSION, **manifest, "files": files}
    _write_atomically(folder / "manifest.json", json.dumps(complete, indent=1, sort_keys=True).encode())
    return complete


def _npy_bytes(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def compact_ids(token_arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Replace token ids by indices into the sorted ids in use (`vocab`), in 16 bits if they fit, else 32."""
    vocab = np.unique(np.concatenate([np.unique(array) for array in token_arrays.values()]))
    dtype = np.uint16 if len(vocab) <= 2**16 else np.uint32
    compact = {name: np.searchsorted(vocab, array).astype(dtype) for name, array in token_arrays.items()}
    return {**compact, "vocab": vocab.astype(np.int32)}
