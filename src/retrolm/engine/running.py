"""Which program runs in this thread: what hooks on the model need to know, also where autograd repeats a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

PROGRAM: ContextVar[Any] = ContextVar("retrolm_program", default=None)


def num_bookmark_rows() -> int:
    """How many rows at the end of the pass that runs in this thread are bookmarks, which adapters leave out."""
    return int(getattr(PROGRAM.get(), "num_bookmarks", 0))


@contextmanager
def rejoined(program: Any) -> Iterator[None]:
    """Let a thread that repeats part of a pass see the pass's program; the pass must still be inside `Attachment.run`.

    Under checkpointing autograd runs layers a second time, on CUDA in a thread of its own.
    """
    token = PROGRAM.set(program)
    try:
        yield
    finally:
        PROGRAM.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for `torch.utils.checkpoint`: the second run of a layer belongs to the pass of its first run."""
    return nullcontext(), rejoined(PROGRAM.get())
