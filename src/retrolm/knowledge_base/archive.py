"""A base as one file: a plain tar, manifest first, then the documents' files. Importing trusts nothing in it."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import IO

from ..errors import UserError
from .check import check_base
from .durable import DurableFile, open_regular, require_space, sync_folder
from .faults import DamagedBaseError
from .folder import DOCUMENTS_FOLDER, Snapshot, prepare_folder
from .manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, parse, render, write_manifest

_PIECE = 1 << 20


def export_base(base: str | Path, target: Path) -> int:
    """Write a base into one file; returns its bytes. Removed documents stay out.

    Raises:
        UserError: the target is there already, or there is no space.
    """
    if target.exists():
        raise UserError(f"{target} is there already. Name another file.")
    snapshot = Snapshot(base)
    try:
        manifest = snapshot.manifest.next(list(snapshot.manifest.documents), [])
        require_space(target.absolute().parent, sum(entry.num_bytes for entry in manifest.documents))
        part = target.with_name(f".{target.name}.part")
        try:
            with part.open("wb") as file:
                _pack(snapshot, manifest, file)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    finally:
        snapshot.close()
    return target.stat().st_size


def _pack(snapshot: Snapshot, manifest: Manifest, file: IO[bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        data = render(manifest)
        archive.addfile(_member(MANIFEST_FILE, len(data)), io.BytesIO(data))
        for entry in manifest.documents:
            for name, known in entry.files.items():
                member = _member(f"{DOCUMENTS_FOLDER}/{entry.id}/{name}", known.bytes)
                _add_file(archive, member, snapshot.file(entry, name))


def _add_file(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    with open_regular(path, str(path)) as (descriptor, size), open(descriptor, "rb", closefd=False) as source:
        if size != member.size:
            raise DamagedBaseError(f"{path} has {size} bytes instead of {member.size}. See: retrolm kb verify")
        archive.addfile(member, source)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


def import_base(archive: Path, folder: Path) -> Manifest:
    """Unpack an exported base into a new folder, which appears only when everything in it was checked.

    Raises:
        UserError: the folder is there already, or no space. DamagedBaseError: the file is no exported base, is
            damaged, or holds anything that an export doesn't.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder} is there already. Name a new folder for the base.")
    if not archive.is_file():
        raise UserError(f"There is no file {archive}. Give a file written by `retrolm kb export`.")
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise UserError(f"There is no folder {parent}. Make it first.")
    staging = Path(tempfile.mkdtemp(dir=parent, prefix=f".{folder.name}-"))
    try:
        manifest = _unpack(archive, staging)
        checked = check_base(staging)
        if checked.problems:
            raise DamagedBaseError(f"{archive} is damaged: {checked.problems[0].message}")
        staging.chmod(0o755)
        staging.rename(folder)
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return manifest


def _unpack(path: Path, staging: Path) -> Manifest:
    try:
        with tarfile.open(path, "r:") as archive:  # plain tar only: what is compressed is refused unread
            manifest = _read_manifest(archive, path)
            require_space(staging, sum(entry.num_bytes for entry in manifest.documents))
            prepare_folder(staging)
            _unpack_documents(archive, manifest, staging, path)
    except (tarfile.TarError, EOFError, OverflowError, MemoryError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedBaseError(f"{path} is no file written by `retrolm kb export` ({error}).") from None
    write_manifest(staging, manifest)
    return manifest


def _read_manifest(archive: tarfile.TarFile, path: Path) -> Manifest:
    first = archive.next()
    if first is None or first.name != MANIFEST_FILE or not _is_plain(first) or first.size > MAX_MANIFEST_BYTES:
        raise DamagedBaseError(f"{path} is no exported base: it doesn't begin with {MANIFEST_FILE}.")
    return parse(_content(archive, first).read(), f"{MANIFEST_FILE} in {path}")


def _unpack_documents(archive: tarfile.TarFile, manifest: Manifest, staging: Path, path: Path) -> None:
    expected = {
        f"{DOCUMENTS_FOLDER}/{entry.id}/{name}": file.bytes
        for entry in manifest.documents
        for name, file in entry.files.items()
    }
    while (member := archive.next()) is not None:
        size = expected.pop(member.name, None)
        if size is None or not _is_plain(member) or member.size != size:
            raise DamagedBaseError(
                f"{path} holds {member.name[:80]!r}, which doesn't belong into a base like this. Nothing was unpacked."
            )
        target = staging / member.name
        target.parent.mkdir(exist_ok=True)
        _copy(_content(archive, member), target)
    if expected:
        raise DamagedBaseError(f"{path} is cut short: {min(expected)} is missing.")


def _is_plain(member: tarfile.TarInfo) -> bool:
    """An ordinary file: no link, device, folder or sparse file, whose size on disk could be anything."""
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and getattr(member, "sparse", None) is None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None  # only links and devices have none
    return content


def _copy(source: IO[bytes], target: Path) -> None:
    with DurableFile(target) as file:
        while piece := source.read(_PIECE):
            file.write(piece, digest=False)
