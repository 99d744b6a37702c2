"""One stored document as a reader uses it: its index, pages and text, opened when first needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .copying import open_index, open_pages, what_of
from .durable import open_regular, read_exactly
from .faults import DamagedBaseError
from .folder import document_folder
from .index import IndexFile, text_sha256
from .manifest import TEXT_FILE, DocumentEntry
from .shard import PageReader, RecordShape


@dataclass
class StoredDocument:
    """Index, pages and text of one document of the base in folder `base`, whose pages are of `shape`."""

    base: Path
    entry: DocumentEntry
    shape: RecordShape

    @cached_property
    def index(self) -> IndexFile:
        return open_index(self.base, self.entry, self.shape)

    @cached_property
    def pages(self) -> PageReader:
        return open_pages(self.base, self.entry, self.shape, self.index)

    @cached_property
    def text(self) -> str:
        """The text; raises `DamagedBaseError` if it isn't the one that was read."""
        what = what_of(self.entry, TEXT_FILE)
        with open_regular(document_folder(self.base, self.entry) / TEXT_FILE, what) as (descriptor, size):
            if size != self.entry.files[TEXT_FILE].bytes:
                raise DamagedBaseError(f"{what} has {size} bytes. Remove the document and add it again.")
            found = read_exactly(descriptor, 0, size, what).decode("utf-8", "replace")
        if text_sha256(found) != self.entry.sha256:
            raise DamagedBaseError(f"{what} doesn't match its checksum. Remove the document and add it again.")
        return found

    def page_text(self, page: int) -> str:
        """The text of one page; "" for a prefix page."""
        start, end = self.span(page)
        return self.text[start:end] if end > start else ""

    def span(self, page: int) -> tuple[int, int]:
        """Character span of one page."""
        start, end = self.index.spans[page].tolist()
        return start, end
