"""Batches shared out over shards that may get lost: each batch is answered once, or recorded as broken."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import RetroLMError
from .answering import Answered, Batch
from .variants import Variant

MAX_LOSSES = 3
_NOTHING_MEASURED = {
    "total_s": 0.0,
    "batch_size": 1,
    "peak_device_bytes": 0,
    "peak_host_bytes": 0,
    "beyond_window": False,
}


class LostShardError(RetroLMError):
    """The process or machine that was answering is gone; the message says what is known."""


class Shards(Protocol):
    """Processes that answer one batch at a time each. A ticket stands for a batch that was given to one."""

    num_shards: int

    def start(self, shard: int, variant: Variant, batch: Batch) -> Any:
        """Give a batch to a shard; returns a hashable ticket at once."""
        ...

    def wait(self, tickets: Collection[Any]) -> Any:
        """Wait for any of the tickets; returns it."""
        ...

    def result(self, ticket: Any) -> list[Answered]:
        """Answers of a finished ticket; raises `LostShardError`, or what the shard raised."""
        ...

    def replace(self, shard: int) -> None:
        """Start a new process in place of a lost one."""
        ...


@dataclass(frozen=True)
class _Task:
    batch: Batch
    num_losses: int = 0


def share_out(
    shards: Shards, variant: Variant, batches: Iterable[Batch], provenance: dict[str, Any]
) -> Iterator[list[Answered]]:
    """Yield answers as shards give them, in any order.

    Samples of a lost shard are tried again one by one; one that lost `MAX_LOSSES` shards is recorded as broken.

    Args:
        provenance: for the rows of samples that no shard came back from.
    """
    waiting = deque(_Task(batch) for batch in batches)
    idle = list(range(shards.num_shards))
    running: dict[Any, tuple[int, _Task]] = {}
    while waiting or running:
        while waiting and idle:
            shard, task = idle.pop(), waiting.popleft()
            running[shards.start(shard, variant, task.batch)] = (shard, task)
        ticket = shards.wait(running)
        shard, task = running.pop(ticket)
        try:
            yield shards.result(ticket)
        except LostShardError as error:
            shards.replace(shard)
            again, given_up = _after_loss(task, error, provenance)
            waiting.extend(again)
            if given_up:
                yield given_up
        idle.append(shard)


def _after_loss(task: _Task, error: LostShardError, provenance: dict[str, Any]) -> tuple[list[_Task], list[Answered]]:
    """What to try again, and what is given up."""
    losses = task.num_losses + 1
    if losses < MAX_LOSSES:
        return [_Task([sample], losses) for sample in task.batch], []
    text = f"{type(error).__name__}: {error} ({losses} times)"
    return [], [Answered(sample, text, dict(_NOTHING_MEASURED), provenance) for sample in task.batch]
