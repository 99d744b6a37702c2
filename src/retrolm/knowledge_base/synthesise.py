"""Documents of made-up size: the pages of a short text, repeated. For tests and measurements of large bases.

Keys, values and digests are those of real pages; digests differ a little from one repetition to the next, so that
layers choose pages from all over the document.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .copying import RECORDS_AT_ONCE
from .durable import DurableFile
from .index import Index, text_sha256
from .manifest import INDEX_FILE, PAGES_FILE, TEXT_FILE, DocumentEntry, FileEntry
from .reading import ReadText, digests_of, mean_keys_of, read_text, stored_pages
from .shard import PageWriter
from .tensors import record_shape, to_array, to_tensor
from .writer import Writer

if TYPE_CHECKING:
    from .base import KnowledgeBase

_NOISE = 0.3


@dataclass(frozen=True)
class Repeated:
    """A text that was read, its whole pages repeated until there are `num_pages`.

    Attributes:
        source: for each page, which page of `read` it repeats; the prefix comes once.
    """

    read: ReadText
    source: NDArray[np.int64]
    spans: NDArray[np.int64]
    text: str


def add_repeated(base: KnowledgeBase, text: str, num_tokens: int, name: str) -> DocumentEntry:
    """Read a short text and add a document of about `num_tokens` tokens made of its pages.

    The text should be some pages long; a last short page is left out.
    """
    repeated = _repeat(read_text(base.lm, text), num_tokens)
    read = repeated.read
    entry = read.entry(name, "", {"synthesised": True})
    fields: dict[str, Any] = {
        "num_pages": len(repeated.source),
        "num_tokens": int(read.table.lengths.numpy()[repeated.source].sum()),
        "sha256": text_sha256(repeated.text),
    }
    entry = DocumentEntry(**{**entry.__dict__, **fields})
    record = record_shape(read.encoder.parts.store.layout)
    num_bytes = record.record_bytes * record.num_layers * len(repeated.source)
    with Writer(base.folder) as writer:
        return writer.add(entry, num_bytes, partial(_store, repeated))


def _repeat(read: ReadText, num_tokens: int) -> Repeated:
    lengths = read.table.lengths.numpy()
    first = max(read.num_prefix, read.table.num_sink)
    body = [page for page in range(first, len(lengths)) if lengths[page] == read.table.page_size]
    copies = -(-num_tokens // (len(body) * read.table.page_size))
    source = np.array([*range(first), *(body * copies)], np.int64)
    spans = np.array(read.spans, np.int64).reshape(-1, 2)
    start, end = int(spans[body[0], 0]), int(spans[body[-1], 1])
    shift = np.repeat(np.arange(copies), len(body)) * (end - start) - start
    moved = np.concatenate([spans[:first], spans[source[first:]] + shift[:, None]])
    return Repeated(
        read, source, np.concatenate([np.zeros_like(spans[:first]), moved[first:]]), read.text[start:end] * copies
    )


def _store(repeated: Repeated, folder: Path) -> dict[str, FileEntry]:
    read, source = repeated.read, repeated.source
    shape = record_shape(read.encoder.parts.store.layout)
    pages = PageWriter(folder / PAGES_FILE, shape, len(source))
    for layer in range(shape.num_layers):
        records = np.frombuffer(stored_pages(read, layer), np.uint8).reshape(-1, shape.record_bytes)
        for first in range(0, len(source), RECORDS_AT_ONCE):
            pages.write(records[source[first : first + RECORDS_AT_ONCE]].tobytes())
    pages.close()
    index = _index(repeated, pages.crc32).write(folder / INDEX_FILE)
    with DurableFile(folder / TEXT_FILE) as text:
        text.write(repeated.text.encode())
    written = {PAGES_FILE: pages.file, INDEX_FILE: index, TEXT_FILE: text}
    return {name: FileEntry(file.num_bytes, file.sha256) for name, file in written.items()}


def _index(repeated: Repeated, crc32: NDArray[np.uint32]) -> Index:
    read, source = repeated.read, repeated.source
    digests = {layer: to_array(digests_of(read, layer)) for layer in read.encoder.parts.digests.layers()}
    return Index(
        crc32,
        read.lengths.numpy()[source].astype(np.int32),
        repeated.spans,
        np.array([token for page in source.tolist() for token in read.pages[page]], np.int32),
        {layer: _varied(*rows, source, seed=layer) for layer, rows in digests.items()},
        {layer: _varied(*to_array(rows), source, seed=-layer) for layer, rows in mean_keys_of(read).items()},
    )


def _varied(dtype: str, rows: NDArray[Any], source: NDArray[np.int64], seed: int) -> tuple[str, NDArray[Any]]:
    """Rows of the repeated pages with a little noise; rows that say where a page stands go on counting."""
    plain = to_tensor(dtype, rows.copy())
    if plain.shape[1] == 1:
        return to_array(plain.new_tensor(np.arange(len(source)))[:, None] + plain[0])
    noise = np.random.default_rng(abs(seed)).standard_normal((len(source), plain.shape[1]), np.float32)
    wide = plain.double().numpy()
    found = wide[source] + noise * wide.std(0) * _NOISE
    return to_array(plain.new_tensor(found))
