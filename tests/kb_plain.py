"""Bases of made-up pages, written without torch: what tests of files, crashes and archives work on."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from retrolm.knowledge_base.durable import DurableFile
from retrolm.knowledge_base.folder import create_folder
from retrolm.knowledge_base.index import Index, text_sha256
from retrolm.knowledge_base.manifest import INDEX_FILE, PAGES_FILE, TEXT_FILE, DocumentEntry, FileEntry
from retrolm.knowledge_base.shard import PageWriter, RecordShape
from retrolm.knowledge_base.writer import Writer

SHAPE = RecordShape("F32", 2, (4, 1, 3))
FINGERPRINT = {"model": "made up", "page_size": 4}


def make_base(folder: Path) -> Path:
    create_folder(folder, {"model": "none"}, FINGERPRINT, SHAPE.to_json())
    return folder


def made_up(name: str, seed: int, num_pages: int = 5) -> tuple[DocumentEntry, str]:
    """An entry, and a text that follows from the seed."""
    text = f"{name} {random.Random(seed).random()} " * 3
    entry = DocumentEntry("", name, "", text_sha256(text), num_pages * 4, num_pages, 1, 1, 0.0, 8, "", {})
    return entry, text


def fill(folder: Path, entry: DocumentEntry, text: str) -> dict[str, FileEntry]:
    """Write a document of random pages."""
    values = np.random.default_rng(len(text)).random((SHAPE.num_layers, entry.num_pages, 2, *SHAPE.half), np.float32)
    pages = PageWriter(folder / PAGES_FILE, SHAPE, entry.num_pages)
    for layer in values:
        pages.write(layer.tobytes())
    pages.close()
    index = Index(
        pages.crc32,
        np.full(entry.num_pages, 4, np.int32),
        np.zeros((entry.num_pages, 2), np.int64),
        np.arange(entry.num_tokens, dtype=np.int32),
    ).write(folder / INDEX_FILE)
    with DurableFile(folder / TEXT_FILE) as file:
        file.write(text.encode())
    written = {PAGES_FILE: pages.file, INDEX_FILE: index, TEXT_FILE: file}
    return {name: FileEntry(found.num_bytes, found.sha256) for name, found in written.items()}


def add(writer: Writer, name: str, seed: int, num_pages: int = 5, replaces: str | None = None) -> DocumentEntry:
    entry, text = made_up(name, seed, num_pages)
    return writer.add(entry, 1000, lambda folder: fill(folder, entry, text), replaces)


def base_of(folder: Path, *names: str) -> Path:
    """A base with one document per name."""
    make_base(folder)
    with Writer(folder) as writer:
        for seed, name in enumerate(names):
            add(writer, name, seed)
    return folder


def names_in(folder: Path) -> list[str]:
    from retrolm.knowledge_base.manifest import read_manifest

    return [entry.name for entry in read_manifest(folder).documents]
