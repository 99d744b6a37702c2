"""`verify`: every byte of a base against its checksums. Needs no model and no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .copying import RECORDS_AT_ONCE, open_index, open_pages, what_of
from .durable import sha256_of
from .faults import DamagedBaseError, MismatchError
from .folder import DOCUMENTS_FOLDER, Snapshot, document_folder
from .manifest import DOCUMENT_ID, INDEX_FILE, MANIFEST_FILE, PAGES_FILE, TEXT_FILE, DocumentEntry
from .shard import RecordShape

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """One fault: in which document ("" = the base itself) and file, and what is wrong."""

    document: str
    file: str
    message: str


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        num_unused: folders that belong to no document (removed ones, leftovers of a crash); `gc` deletes them.
    """

    problems: tuple[Problem, ...]
    num_documents: int
    num_records: int
    num_unused: int

    @property
    def sound(self) -> bool:
        return not self.problems


def check_base(base: str | Path, progress: Progress | None = None) -> Checked:
    """Check a whole base; faults are returned, not raised.

    Raises:
        MismatchError: there is no base at `base`, or one of another format version.
    """
    try:
        snapshot = Snapshot(base)
        shape = RecordShape.from_json(snapshot.manifest.pages)
    except MismatchError:
        raise
    except DamagedBaseError as error:
        return Checked((Problem("", MANIFEST_FILE, str(error)),), 0, 0, 0)
    try:
        return _check(snapshot, shape, progress)
    finally:
        snapshot.close()


def _check(snapshot: Snapshot, shape: RecordShape, progress: Progress | None) -> Checked:
    documents = snapshot.manifest.documents
    total = sum(entry.num_pages for entry in documents) * shape.num_layers
    problems: list[Problem] = []
    done = 0
    for entry in documents:
        problems += check_document(snapshot.base, entry, shape)
        done += entry.num_pages * shape.num_layers
        if progress is not None:
            progress(done, total)
    known = {entry.id for entry in documents}
    return Checked(tuple(problems), len(documents), total, _count_unused(snapshot.base, known))


def check_document(base: Path, entry: DocumentEntry, shape: RecordShape) -> list[Problem]:
    """All faults of one document."""
    try:
        folder = document_folder(base, entry)
    except DamagedBaseError as error:
        return [Problem(entry.name, "", str(error))]
    problems = [Problem(entry.name, name, text) for name, text in _file_faults(folder, entry)]
    if not any(problem.file == INDEX_FILE for problem in problems):
        problems += [Problem(entry.name, PAGES_FILE, text) for text in _page_faults(base, entry, shape)]
    return problems


def _file_faults(folder: Path, entry: DocumentEntry) -> Iterator[tuple[str, str]]:
    for name, file in entry.files.items():
        what = what_of(entry, name)
        try:
            size = os.lstat(folder / name).st_size if (folder / name).exists() else None
            if size is not None and size != file.bytes:
                yield name, f"{what} has {size} bytes instead of {file.bytes}."
            elif name != PAGES_FILE and sha256_of(folder / name, what) != file.sha256:
                yield name, f"{what} doesn't match its checksum."
            elif name == TEXT_FILE and entry.sha256 != file.sha256:
                yield name, f"{what} isn't the text that the manifest names."
        except DamagedBaseError as error:
            yield name, str(error)
    for extra in sorted({path.name for path in folder.iterdir()} - set(entry.files)):
        yield extra, f"{extra!r} doesn't belong to {entry.name!r}."


def _page_faults(base: Path, entry: DocumentEntry, shape: RecordShape) -> Iterator[str]:
    try:
        pages = open_pages(base, entry, shape, open_index(base, entry, shape))
    except DamagedBaseError as error:
        yield str(error)
        return
    for layer in range(shape.num_layers):
        for first in range(0, entry.num_pages, RECORDS_AT_ONCE):
            try:
                pages.read_run(layer, first, min(first + RECORDS_AT_ONCE, entry.num_pages))
            except DamagedBaseError as error:
                yield str(error)


def _count_unused(base: Path, known: set[str]) -> int:
    folder = base / DOCUMENTS_FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sum(1 for name in names if DOCUMENT_ID.fullmatch(name) and name not in known)
