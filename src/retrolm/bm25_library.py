"""bm25s, loaded so that it leaves a GPU's memory alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import UserError

_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def load_bm25s(what: str, extra: str) -> Any:
    """Return the module bm25s.

    Importing it starts JAX where that is installed, and JAX would take three quarters of the GPU's free memory.

    Args:
        what: what needs it, as a sentence begins. extra: of which extra of this package it is part.

    Raises `UserError` if it isn't installed.
    """
    try:
        with _without_preallocation():
            import bm25s
    except ImportError:
        raise UserError(f"{what} needs bm25s: pip install 'retrolm[{extra}]'.") from None
    return bm25s


@contextmanager
def _without_preallocation() -> Iterator[None]:
    chosen = os.environ.get(_PREALLOCATE)
    os.environ.setdefault(_PREALLOCATE, "false")
    try:
        yield
    finally:
        if chosen is None:
            del os.environ[_PREALLOCATE]
