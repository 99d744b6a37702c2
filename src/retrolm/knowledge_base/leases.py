"""Which generations of a base are being read, so that `gc` deletes nothing that a reader may still open.

A reader holds a shared lock on `readers/GENERATION`; the system lets go of it when the process ends, however it ends.
Where locks can't be taken (a read-only disk, a system without flock, a link in the lock's place) a base is read without
one.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where open files can't be deleted anyway
    fcntl = None  # type: ignore[assignment]

READERS_FOLDER = "readers"


class Lease:
    """One reader's hold on one generation."""

    def __init__(self, base: Path, generation: int) -> None:
        descriptor = _locked(base / READERS_FOLDER / str(generation), shared=True)
        self._close = None if descriptor is None else weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Let go; done as well when the lease is no longer referred to."""
        if self._close is not None:
            self._close()


def oldest_read(base: Path, current: int) -> int:
    """The oldest generation that someone reads (`current` if none older is); forgets those that nobody does."""
    held = [current]
    for path in (base / READERS_FOLDER).iterdir():
        if not path.name.isdigit() or int(path.name) >= current:
            continue
        descriptor = _locked(path, shared=False)
        if descriptor is None:
            held.append(int(path.name))
            continue
        path.unlink(missing_ok=True)
        os.close(descriptor)
    return min(held)


def _locked(path: Path, shared: bool) -> int | None:
    """A descriptor that holds the lock, or None if it can't be had."""
    if fcntl is None:
        return None
    try:
        if path.parent.is_symlink():
            return None
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
