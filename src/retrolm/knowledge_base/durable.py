"""Files that are on the disk when a call returns, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ..errors import UserError
from .faults import DamagedBaseError

RESERVE_BYTES = 16 << 20
_PIECE = 1 << 20
_NO_LINKS_NO_WAITING = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for a writer


class DurableFile:
    """A new file that is written front to back; on the disk once `close` (or the block) has ended.

    Attributes:
        num_bytes: bytes written so far. sha256: digest of them, hexadecimal.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview, digest: bool = True) -> None:
        """Append `data`; `digest=False` leaves it out of the file's sha256."""
        write_all(self._descriptor, data)
        self.num_bytes += len(data)
        if digest:
            self._digest.update(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def close(self) -> None:
        """Bring everything to the disk."""
        if self._descriptor >= 0:
            sync(self._descriptor)
            self._forget()

    def _forget(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._descriptor >= 0:
            self._forget()


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`, however few bytes the system takes at a time."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(descriptor, view) :]


def sync(descriptor: int) -> None:
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system knows how."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in place of `path` in one step that survives a crash; an error leaves what was there."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        try:
            write_all(descriptor, data)
            os.fchmod(descriptor, 0o644)
            sync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def open_regular(path: Path, what: str) -> Iterator[tuple[int, int]]:
    """Open a plain file for reading; yields (descriptor, bytes). Links and other kinds are refused.

    Raises:
        DamagedBaseError: `what` (a name for messages) is missing or no plain file.
    """
    try:
        if stat.S_ISLNK(os.lstat(path.parent).st_mode):
            raise DamagedBaseError(f"{what} lies behind a symbolic link, which is not followed. Make a base anew.")
        descriptor = os.open(path, os.O_RDONLY | _NO_LINKS_NO_WAITING | os.O_CLOEXEC)
    except OSError as error:
        reason = "is a symbolic link" if error.errno == errno.ELOOP else _reason(error)
        raise DamagedBaseError(f"{what} {reason}. Restore it, or remove the document and add it again.") from None
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise DamagedBaseError(f"{what} is no plain file. Restore it, or remove the document and add it again.")
        yield descriptor, state.st_size
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, start: int, num_bytes: int, what: str) -> bytes:
    """Bytes [start, start + num_bytes) of an open file; raises `DamagedBaseError` if it is shorter."""
    pieces, at = [], start
    while at < start + num_bytes:
        piece = os.pread(descriptor, min(start + num_bytes - at, 1 << 30), at)
        if not piece:
            raise DamagedBaseError(f"{what} is cut short at byte {at}. Remove the document and add it again.")
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)


def pieces_of(descriptor: int, what: str, num_bytes: int) -> Iterator[bytes]:
    """The first `num_bytes` of an open file, a piece at a time."""
    for at in range(0, num_bytes, _PIECE):
        yield read_exactly(descriptor, at, min(_PIECE, num_bytes - at), what)


def sha256_of(path: Path, what: str) -> str:
    """Digest of a plain file, hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path, what) as (descriptor, size):
        for piece in pieces_of(descriptor, what, size):
            digest.update(piece)
    return digest.hexdigest()


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise `UserError` if `num_bytes` more don't fit the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + RESERVE_BYTES:
        raise UserError(
            f"{folder} needs {num_bytes / 1e6:,.0f} MB more, but its disk has {free / 1e6:,.0f} MB free. Make room, "
            "or keep the base on another disk."
        )


def _reason(error: OSError) -> str:
    return "is missing" if error.errno == errno.ENOENT else f"can't be opened ({error.strerror})"
