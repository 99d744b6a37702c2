"""The one writer of a base: every change becomes visible in one step, when the manifest is replaced."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UserError
from .copying import copy_document
from .durable import require_space, sync_folder
from .faults import BusyBaseError, MismatchError
from .folder import DOCUMENTS_FOLDER, LOCK_FILE, prepare_folder, refuse_links
from .leases import oldest_read
from .manifest import (
    DOCUMENT_ID,
    MANIFEST_FILE,
    DocumentEntry,
    FileEntry,
    Manifest,
    Removed,
    read_manifest,
    write_manifest,
)
from .shard import RecordShape

FillFolder = Callable[[Path], dict[str, FileEntry]]


@dataclass(frozen=True)
class Collected:
    """What `gc` did: folders deleted, their bytes, and how many wait for a reader of an older generation."""

    num_deleted: int
    num_bytes: int
    num_held: int


class Writer:
    """Holds a base's lock; use it as a context manager.

    Args:
        wait_s: seconds to wait for another writer.

    Raises:
        BusyBaseError: another process writes. UserError: the folder can't be written to.
    """

    def __init__(self, base: str | Path, wait_s: float = 0.0) -> None:
        self.base = Path(base)
        read_manifest(self.base)  # refuses what is no base before a lock file appears in it
        refuse_links(self.base)
        self._lock = FileLock(self.base / LOCK_FILE)
        try:
            self._lock.acquire(timeout=wait_s)
        except Timeout:
            raise BusyBaseError(
                f"Another process is writing to {self.base}. Try again when it has finished, or wait with --wait-s."
            ) from None
        except OSError as error:
            raise UserError(f"{self.base} can't be written to: {error.strerror}.") from None
        try:
            prepare_folder(self.base)
            self.manifest = read_manifest(self.base)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, entry: DocumentEntry, num_bytes: int, fill: FillFolder, replaces: str | None = None) -> DocumentEntry:
        """Add one document.

        Args:
            entry: the document; its `id`, `added_at` and `files` are filled in here.
            num_bytes: about how many bytes it will take. fill: writes its files into the folder it is given.
            replaces: id of the document whose place it takes.

        Raises:
            UserError: not enough space.
        """
        require_space(self.base, num_bytes)
        found = f"{entry.sha256[:12]}-{secrets.token_hex(4)}"
        entry = replace(entry, id=found, added_at=datetime.now(UTC).isoformat(timespec="seconds"))
        folder = self.base / DOCUMENTS_FOLDER / found
        folder.mkdir()
        try:
            entry = replace(entry, files=fill(folder))
            sync_folder(folder)
            sync_folder(folder.parent)
            self._put(entry, replaces)
        except BaseException:
            if entry.id not in {known.id for known in read_manifest(self.base).documents}:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return entry

    def remove(self, ids: Iterable[str]) -> list[DocumentEntry]:
        """Take documents out of the base; their files stay until `collect`."""
        gone = set(ids)
        found = [entry for entry in self.manifest.documents if entry.id in gone]
        if found:
            self._commit([entry for entry in self.manifest.documents if entry.id not in gone], found)
        return found

    def change(self, entry: DocumentEntry) -> None:
        """Put another name, source or metadata on a document; its files stay."""
        self._commit([entry if known.id == entry.id else known for known in self.manifest.documents], [])

    def merge(self, source: Path, other: Manifest, entries: Iterable[DocumentEntry]) -> list[DocumentEntry]:
        """Copy documents of another base in; those whose text is here already are left out. Returns those added.

        Raises:
            MismatchError: the other base was read with another model or other options, or a name is taken.
        """
        require_same(self.manifest.fingerprint, other.fingerprint, "The two bases")
        known = {entry.sha256 for entry in self.manifest.documents}
        names = {entry.name for entry in self.manifest.documents}
        added = []
        for entry in entries:
            if entry.sha256 in known:
                continue
            if entry.name in names:
                raise MismatchError(
                    f"Both bases have a document {entry.name!r}, with different texts. Remove one of the two first."
                )
            fill = partial(copy_document, source, entry, RecordShape.from_json(other.pages))
            added.append(self.add(entry, entry.num_bytes, fill))
        return added

    def collect(self) -> Collected:
        """Delete the files of removed documents that no reader can still want, and leftovers of crashes."""
        oldest = oldest_read(self.base, self.manifest.generation)
        held = [entry for entry in self.manifest.removed if entry.generation > oldest]
        kept = {entry.id for entry in self.manifest.documents} | {entry.id for entry in held}
        gone, freed = 0, 0
        for path in (self.base / DOCUMENTS_FOLDER).iterdir():
            if DOCUMENT_ID.fullmatch(path.name) and path.name not in kept and path.is_dir() and not path.is_symlink():
                freed += sum(file.lstat().st_size for file in path.iterdir())
                shutil.rmtree(path)
                gone += 1
        for leftover in self.base.glob(f".{MANIFEST_FILE}-*"):
            leftover.unlink(missing_ok=True)
        if len(held) < len(self.manifest.removed):
            self._write(self.manifest.next(list(self.manifest.documents), held))
        return Collected(gone, freed, len(held))

    def _put(self, entry: DocumentEntry, replaces: str | None) -> None:
        documents = list(self.manifest.documents)
        places = [index for index, known in enumerate(documents) if known.id == replaces]
        if places:
            old, documents[places[0]] = documents[places[0]], entry
            self._commit(documents, [old])
        else:
            self._commit([*documents, entry], [])

    def _commit(self, documents: list[DocumentEntry], gone: list[DocumentEntry]) -> None:
        removed = [*self.manifest.removed, *(Removed(e.id, self.manifest.generation + 1) for e in gone)]
        self._write(self.manifest.next(documents, removed))

    def _write(self, manifest: Manifest) -> None:
        write_manifest(self.base, manifest)
        self.manifest = manifest


def require_same(ours: dict[str, Any], theirs: dict[str, Any], who: str) -> None:
    """Raise `MismatchError`, naming each difference, unless two fingerprints are equal."""
    different = [
        f"{key}: {ours.get(key)!r} and {theirs.get(key)!r}"
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
    ]
    if different:
        raise MismatchError(
            f"{who} don't fit together ({'; '.join(different)}). Stored pages are only good for what they were read "
            "with: use that, or read the texts into a new base."
        )
