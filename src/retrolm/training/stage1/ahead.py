"""Reading ahead: the backbone's pass over the next batch is handed to the GPU while this batch's gradients are.

The backbone is frozen, so its pass over a batch depends on no step before. What training adds is thousands of small
kernels, which a GPU is done with sooner than a host can launch them; in between it works on the next pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch

from .batches import Stage1Batch
from .step import FrozenPass


@dataclass(frozen=True)
class ReadBatch:
    """A batch on the device and the backbone's pass over it."""

    batch: Stage1Batch
    frozen: FrozenPass


class ReadAhead(Iterator[ReadBatch]):
    """Batches in order, each read by the backbone.

    Args:
        batches: on the host. read: the frozen pass. ahead: let `begin` do something; by default on GPUs alone, since
            on a CPU both passes would share the same cores.
    """

    def __init__(
        self,
        batches: Iterator[Stage1Batch],
        read: Callable[[Stage1Batch], FrozenPass],
        device: torch.device,
        ahead: bool | None = None,
    ) -> None:
        self._batches, self._read, self._device = batches, read, device
        self._waiting: deque[Stage1Batch] = deque()
        self._begun: Future[ReadBatch] | None = None
        is_ahead = device.type == "cuda" if ahead is None else ahead
        self._helper = ThreadPoolExecutor(1, "retrolm-read-ahead") if is_ahead else None

    def peek(self, count: int) -> list[Stage1Batch]:
        """The next batches, on the device; they are still to come. To be called before `begin`."""
        missing = islice(self._batches, max(count - len(self._waiting), 0))
        self._waiting.extend(batch.to(self._device) for batch in missing)
        return list(islice(self._waiting, count))

    def __next__(self) -> ReadBatch:
        begun, self._begun = self._begun, None
        return self._next() if begun is None else begun.result()

    def begin(self) -> None:
        """Start on the next batch in a thread of its own, on the present stream; `next` waits for it."""
        if self._helper is not None and self._begun is None:
            self._begun = self._helper.submit(self._next_on, self._stream())

    def stop(self) -> None:
        """Wait for what was begun and forget it: the model is free again."""
        if self._helper is not None:
            self._helper.shutdown()
        self._begun = None

    def _next(self) -> ReadBatch:
        (batch,) = self.peek(1)
        self._waiting.popleft()
        return ReadBatch(batch, self._read(batch))

    def _next_on(self, stream: AbstractContextManager[object]) -> ReadBatch:
        with stream:
            return self._next()

    def _stream(self) -> AbstractContextManager[object]:
        """A thread begins on the first GPU's own stream, whatever its parent works on."""
        if self._device.type != "cuda":
            return nullcontext()
        block: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.current_stream(self._device))
        return block
