"""A base as a folder: making one, and a consistent view of one for readers."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError, suggest
from .durable import sync_folder
from .faults import DamagedBaseError
from .leases import READERS_FOLDER, Lease
from .manifest import MANIFEST_FILE, DocumentEntry, Manifest, read_manifest, write_manifest

DOCUMENTS_FOLDER = "documents"
LOCK_FILE = "writer.lock"
_OWN = {DOCUMENTS_FOLDER, READERS_FOLDER, LOCK_FILE}


def create_folder(folder: Path, setup: dict[str, Any], fingerprint: dict[str, Any], pages: dict[str, Any]) -> None:
    """Make an empty base.

    Raises:
        UserError: there is something at `folder` already.
    """
    if (folder / MANIFEST_FILE).exists():
        raise UserError(f"{folder} is a knowledge base already. Add to it, or name another folder.")
    if folder.exists() and (not folder.is_dir() or not _is_bare(folder)):
        raise UserError(f"{folder} isn't empty. Name a new folder for the base.")
    prepare_folder(folder)
    write_manifest(folder, Manifest(secrets.token_hex(8), 1, setup, fingerprint, pages))
    sync_folder(folder.absolute().parent)


def prepare_folder(folder: Path) -> None:
    """Make the folders a base consists of."""
    for name in (DOCUMENTS_FOLDER, READERS_FOLDER):
        (folder / name).mkdir(parents=True, exist_ok=True)


def refuse_links(folder: Path) -> None:
    """Raise `DamagedBaseError` where a writer would follow a link out of the base."""
    for name in sorted(_OWN):
        if (folder / name).is_symlink():
            raise DamagedBaseError(f"{folder / name} is a symbolic link, which is not followed. Make the base anew.")


def _is_bare(folder: Path) -> bool:
    """Whether nothing but an unfinished `create` left something here."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(f".{MANIFEST_FILE}-")}
    return names <= _OWN and not any((folder / DOCUMENTS_FOLDER).glob("*"))


def document_folder(base: Path, entry: DocumentEntry) -> Path:
    """The folder of one document; raises `DamagedBaseError` if it is missing or a link."""
    path = base / DOCUMENTS_FOLDER / entry.id
    for part in (path.parent, path):
        try:
            mode = os.lstat(part).st_mode
        except OSError:
            raise DamagedBaseError(
                f"{entry.name!r}: its folder {path} is missing. Remove the document and add it again."
            ) from None
        if not stat.S_ISDIR(mode):
            raise DamagedBaseError(f"{entry.name!r}: {part} is no folder of its own (a link?). Make the base anew.")
    return path


class Snapshot:
    """One generation of a base, unchanged for as long as it is held, whatever a writer does meanwhile."""

    def __init__(self, base: str | Path) -> None:
        self.base = Path(base)
        while True:
            self.manifest = read_manifest(self.base)
            self._lease = Lease(self.base, self.manifest.generation)
            if read_manifest(self.base).generation == self.manifest.generation:
                return  # a writer that came in between may already have cleaned up behind the older generation
            self._lease.release()

    def close(self) -> None:
        self._lease.release()

    def file(self, entry: DocumentEntry, name: str) -> Path:
        """Path of one file of a document."""
        return document_folder(self.base, entry) / name


def find_documents(manifest: Manifest, names: Iterable[str]) -> list[DocumentEntry]:
    """Documents by name, id or source path, in the base's order; raises `UserError` for an unknown one."""
    wanted: set[str] = set()
    for name in names:
        found = [e.id for e in manifest.documents if name in (e.name, e.id, e.source)]
        if not found:
            allowed = [entry.name for entry in manifest.documents]
            listed = suggest(name, allowed) if len(allowed) <= 20 else f" See: retrolm kb list ({len(allowed)} there)."
            raise UserError(f"No document {name!r} in this base.{listed}")
        wanted.update(found)
    return [entry for entry in manifest.documents if entry.id in wanted]
