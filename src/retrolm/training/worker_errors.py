"""What the processes that build samples say when something goes wrong there."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from ..errors import RetroLMError

Item = TypeVar("Item")
_FROM_WORKER = "Caught "


def from_workers(loader: Iterable[Item]) -> Iterator[Item]:
    """Yield what a `DataLoader` yields; an error of ours in a worker is raised as it was there, without its traceback.

    Raises:
        RetroLMError: as raised in the worker.
    """
    try:
        yield from loader
    except RetroLMError as error:
        text = str(error)
        if not text.startswith(_FROM_WORKER):
            raise
        raise type(error)(text.rstrip().rpartition("\n")[2].partition(": ")[2]) from None


def quiet_worker(number: int) -> None:
    """Keep a worker silent about the end of the main process, which hangs up on it at Ctrl-C (a `worker_init_fn`)."""
    sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)
