"""Asks the system to fetch a model's weights while the libraries are still being imported."""

from __future__ import annotations

import os
from pathlib import Path


def read_ahead(folder: str) -> int:
    """Start reading the weights in `folder` into the file cache; returns how many files that are. Never fails."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None or not Path(folder).is_dir():
        return 0
    files = list(Path(folder).glob("*.safetensors"))
    for path in files:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            advise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
    return len(files)
