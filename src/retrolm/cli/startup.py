"""Starting up: importing torch and transformers is most of what a short command waits for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Leave out garbage collection while libraries are imported: a seventh of that time, and nothing is garbage yet."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules stay, so that later collections needn't look at them
        if was_on:
            gc.enable()
