"""Copies a document's files into another base, checked on the way."""

from __future__ import annotations

from pathlib import Path

from .durable import DurableFile, open_regular, pieces_of
from .faults import DamagedBaseError
from .folder import document_folder
from .index import IndexFile
from .manifest import INDEX_FILE, PAGES_FILE, TEXT_FILE, DocumentEntry, FileEntry
from .shard import PageReader, PageWriter, RecordShape

RECORDS_AT_ONCE = 64


def open_index(base: Path, entry: DocumentEntry, shape: RecordShape) -> IndexFile:
    """The index of a document, checked; raises `DamagedBaseError`."""
    path = document_folder(base, entry) / INDEX_FILE
    return IndexFile(path, entry, shape, entry.files[INDEX_FILE].sha256, what_of(entry, INDEX_FILE))


def open_pages(base: Path, entry: DocumentEntry, shape: RecordShape, index: IndexFile) -> PageReader:
    """The pages of a document; raises `DamagedBaseError` if the file can't be the one that was written."""
    path = document_folder(base, entry) / PAGES_FILE
    return PageReader(path, shape, index.crc32, entry.files[PAGES_FILE].sha256, what_of(entry, PAGES_FILE))


def what_of(entry: DocumentEntry, name: str) -> str:
    """How a file is called in messages."""
    return f"{name} of {entry.name!r}"


def copy_document(base: Path, entry: DocumentEntry, shape: RecordShape, into: Path) -> dict[str, FileEntry]:
    """Copy one document's files from `base` into the folder `into`; returns their manifest entries.

    Raises:
        DamagedBaseError: a file doesn't match its checksums.
    """
    index = open_index(base, entry, shape)
    pages = open_pages(base, entry, shape, index)
    files = {PAGES_FILE: _copy_pages(pages, shape, entry.num_pages, into / PAGES_FILE)}
    for name in (INDEX_FILE, TEXT_FILE):
        files[name] = _copy_file(document_folder(base, entry) / name, into / name, what_of(entry, name))
    for name, file in files.items():
        if file != entry.files[name]:
            raise DamagedBaseError(
                f"{what_of(entry, name)} is damaged: it doesn't match its checksum. Remove the document there first."
            )
    return files


def _copy_pages(pages: PageReader, shape: RecordShape, num_pages: int, target: Path) -> FileEntry:
    writer = PageWriter(target, shape, num_pages)
    for layer in range(shape.num_layers):
        for first in range(0, num_pages, RECORDS_AT_ONCE):
            writer.write(pages.read_run(layer, first, min(first + RECORDS_AT_ONCE, num_pages)))
    writer.close()
    return FileEntry(writer.file.num_bytes, writer.file.sha256)


def _copy_file(source: Path, target: Path, what: str) -> FileEntry:
    with open_regular(source, what) as (descriptor, size), DurableFile(target) as file:
        for piece in pieces_of(descriptor, what, size):
            file.write(piece)
    return FileEntry(file.num_bytes, file.sha256)
