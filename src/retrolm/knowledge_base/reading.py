"""Reads texts with the engine and puts their pages into a base; an edited text only from its first changed page on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..engine.chunk import Chunk, text_group, text_lengths
from ..methods import PageTensors, page_method
from ..paging import PageTable
from .copying import RECORDS_AT_ONCE
from .durable import DurableFile
from .index import Index, TokenPages, text_sha256
from .manifest import INDEX_FILE, PAGES_FILE, TEXT_FILE, DocumentEntry, FileEntry
from .parts import StoredDocument
from .restore import restore
from .shard import PageWriter
from .tensors import record_bytes, record_shape, to_array

if TYPE_CHECKING:
    from ..engine.encoder import Encoder
    from ..engine.model import RetroLM

Progress = Callable[[int, int], None]


@dataclass
class ReadText:
    """A text that was read and not stored yet.

    Attributes:
        table: its pages; the first `num_kept` of them are pages of `old`, the document it was before.
        pages: token ids of each page.
        peak_attended: most tokens any page attended. prefill_s: seconds this reading took.
    """

    text: str
    encoder: Encoder
    table: PageTable
    pages: list[list[int]]
    spans: list[tuple[int, int]]
    num_prefix: int
    peak_attended: int
    prefill_s: float
    num_kept: int = 0
    old: StoredDocument | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each page without its bookmark, int64 [P]."""
        return torch.tensor([len(page) for page in self.pages])

    def entry(self, name: str, source: str, metadata: dict[str, Any]) -> DocumentEntry:
        """Its manifest entry, without what the writer fills in."""
        return DocumentEntry(
            id="",
            name=name,
            source=source,
            sha256=text_sha256(self.text),
            num_tokens=sum(map(len, self.pages)),
            num_pages=len(self.table),
            num_sink=self.table.num_sink,
            num_prefix=self.num_prefix,
            prefill_s=self.prefill_s,
            peak_attended=self.peak_attended,
            added_at="",
            files={},
            metadata=metadata,
        )


def read_text(lm: RetroLM, text: str, old: StoredDocument | None = None, progress: Progress | None = None) -> ReadText:
    """Read a text, going on from the pages that `old`, its earlier version, begins with likewise.

    Raises:
        UserError: nothing to read.
    """
    pages, spans, num_prefix = lm.cut(text)
    kept = 0 if old is None or lm.config.causal_selection else _num_alike(pages, old, num_prefix)
    started = time.perf_counter()
    if old is None or not kept:
        document = lm.read(text, progress=progress)
        seconds = time.perf_counter() - started
        found = (document.encoder, document.table, pages, spans, num_prefix, document.peak_attended, seconds)
        return ReadText(text, *found)
    encoder, table, peak = _read_on(lm, old, pages, kept, progress)
    seconds = time.perf_counter() - started
    return ReadText(text, encoder, table, pages, spans, num_prefix, peak, seconds, kept, old)


def _num_alike(pages: list[list[int]], old: StoredDocument, num_prefix: int) -> int:
    """Leading pages that two versions share; 0 if it is no more than the prefix."""
    before = TokenPages(old.index.token_ids, old.index.lengths)
    alike = 0
    while alike < min(len(pages), len(before)) and pages[alike] == before[alike]:
        alike += 1
    return alike if alike > max(num_prefix, 1) else 0


def _read_on(
    lm: RetroLM, old: StoredDocument, pages: list[list[int]], kept: int, progress: Progress | None
) -> tuple[Encoder, PageTable, int]:
    """Read `pages[kept:]` behind the stored pages before them."""
    document = restore(lm, old, lm.new_store(len(pages) - kept))
    encoder, config = document.encoder, lm.config
    ids = torch.cat([document.table.ids[:kept], encoder.parts.store.reserve(len(pages) - kept)])
    table = PageTable(ids, text_lengths(pages, config), document.table.num_sink, config.page_room)
    peak = old.entry.peak_attended
    for first in range(kept, len(pages), config.chunk_pages):
        part = pages[first : first + config.chunk_pages]
        group = text_group(table, first, part, config, encoder.kept_window)
        peak = max(peak, encoder.encode(Chunk([group], max(map(len, part)))).peak_attended)
        if progress is not None:
            progress(first + len(part) - kept, len(pages) - kept)
    return encoder, table, peak


def store_text(read: ReadText, folder: Path) -> dict[str, FileEntry]:
    """Write a text's files into `folder`; returns their manifest entries."""
    shape = record_shape(read.encoder.parts.store.layout)
    pages = PageWriter(folder / PAGES_FILE, shape, len(read.table))
    for layer in range(shape.num_layers):
        _write_layer(read, pages, layer)
    pages.close()
    index = Index(
        pages.crc32,
        read.lengths.numpy().astype(np.int32),
        np.array(read.spans, np.int64).reshape(-1, 2),
        np.array([token for page in read.pages for token in page], np.int32),
        {layer: to_array(digests_of(read, layer)) for layer in read.encoder.parts.digests.layers()},
        {layer: to_array(rows) for layer, rows in mean_keys_of(read).items()},
    ).write(folder / INDEX_FILE)
    with DurableFile(folder / TEXT_FILE) as text:
        text.write(read.text.encode())
    written = {PAGES_FILE: pages.file, INDEX_FILE: index, TEXT_FILE: text}
    return {name: FileEntry(file.num_bytes, file.sha256) for name, file in written.items()}


def stored_bytes(read: ReadText) -> int:
    """About how many bytes a text's files take."""
    layout = read.encoder.parts.store.layout
    pages = len(read.table) * layout.num_layers * layout.page_bytes
    return pages + read.encoder.parts.digests.bytes() + 64 * read.table.num_tokens


def _write_layer(read: ReadText, pages: PageWriter, layer: int) -> None:
    for first in range(0, read.num_kept, RECORDS_AT_ONCE):
        assert read.old is not None
        pages.write(read.old.pages.read_run(layer, first, min(first + RECORDS_AT_ONCE, read.num_kept)))
    for first in range(read.num_kept, len(read.table), RECORDS_AT_ONCE):
        ids = read.table.ids[first : first + RECORDS_AT_ONCE]
        pages.write(record_bytes(*_on_device(read, layer, ids, stored=True)))


def _on_device(read: ReadText, layer: int, ids: Tensor, stored: bool) -> tuple[Tensor, Tensor]:
    """Pages as they are stored, or as keys and values."""
    store = read.encoder.parts.store
    ids = ids.to(store.layout.devices[layer])
    return store.stored(layer, ids) if stored else store.read(layer, ids)


def digests_of(read: ReadText, layer: int) -> Tensor:
    """Digests of all pages in one layer, [P, E]."""
    device = read.encoder.parts.store.layout.devices[layer]
    return read.encoder.parts.digests.read(layer, read.table.ids.to(device))


def stored_pages(read: ReadText, layer: int) -> bytes:
    """The records of all pages in one layer."""
    return record_bytes(*_on_device(read, layer, read.table.ids, stored=True))


def mean_keys_of(read: ReadText) -> dict[int, Tensor]:
    """Mean keys [P, E] of the first layers that choose without scores: composed answers may want them there."""
    return {layer: _mean_keys(read, layer) for layer in _unscored(read)}


def _unscored(read: ReadText) -> list[int]:
    """First layers that choose without scores."""
    config, backbone = read.encoder.parts.config, read.encoder.parts.backbone
    if config.first_layer_mode == "mean_key":
        return []
    return [layer for layer in range(config.num_skip_layers) if backbone.retrieves(layer)]


def _mean_keys(read: ReadText, layer: int) -> Tensor:
    """Mean keys of all pages in a layer, as method `mean_key` has them."""
    found = []
    for first in range(0, len(read.table), RECORDS_AT_ONCE):
        part = slice(first, first + RECORDS_AT_ONCE)
        keys, _ = _on_device(read, layer, read.table.ids[part], stored=False)
        lengths = read.lengths[part].to(keys.device)
        found.append(page_method("mean_key")().digest(PageTensors(layer, keys, keys, lengths, lengths)).cpu())
    return torch.cat(found)
