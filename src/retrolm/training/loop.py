"""The loop both stages run: steps, checkpoints, logs, stopping by time; what a step does is the stage's own."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..engine.whole_folder import require_folder
from .checkpoint import TrainState, check_identity, load_state, refuse_overwriting, save_state
from .run_log import Log, RunLog

Batch = TypeVar("Batch")


class LoopOptions(Protocol):
    """What the loop reads of a recipe's `[train]` table."""

    @property
    def num_steps(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def dev_every(self) -> int: ...


class TrainingLoop(ABC, Generic[Batch]):
    """Base of the trainers.

    Args:
        name: project name for trackers. options: lengths and rhythms. out: folder for checkpoint and log.
        log: called on the main process with each row; may be set later as `on_row`.

    Attributes:
        step, tokens, seconds: done, seen and spent so far.
        trained: the module whose state is kept. wrapped: the same, ready for several processes.
    """

    trained: nn.Module
    wrapped: nn.Module
    optimizer: Any

    def __init__(
        self,
        name: str,
        accelerator: Accelerator,
        options: LoopOptions,
        out: Path,
        device: torch.device,
        log: Log | None,
    ) -> None:
        self.accelerator, self.out, self.device = accelerator, out, device
        self.on_row = log
        self._options = options
        self._log = RunLog(accelerator, out, name)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """This process's batches from the present step on."""

    @abstractmethod
    def _one_step(self, batches: Iterator[Batch]) -> None:
        """One optimiser step; counts `step`, `tokens` and `seconds`."""

    @abstractmethod
    def _dev_round(self) -> None:
        """Measure on held-out data, and record it."""

    @abstractmethod
    def _save_artefact(self) -> None:
        """Write what was trained as it stands (on the main process)."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What the run is bound to."""

    @abstractmethod
    def _recipe(self) -> dict[str, Any]:
        """The recipe as plain values, for trackers."""

    def run(self, resume: bool = False, stop_after_s: float | None = None) -> bool:
        """Train to the last step, or for about `stop_after_s` seconds.

        Args:
            resume: go on from the checkpoint in `out`, if there is one; the outcome is that of an uninterrupted run.

        Returns:
            Whether the run is complete.

        Raises:
            UserError: `out` holds a checkpoint and `resume` is off, or the checkpoint is of another run; or the loss
            is no number.
        """
        self._begin(resume)
        started = time.perf_counter()
        options = self._options
        batches = self.batches() if self.step < options.num_steps else iter(())
        out_of_time = False
        while self.step < options.num_steps and not out_of_time:
            self._one_step(batches)
            last = self.step == options.num_steps
            if options.dev_every and (last or self.step % options.dev_every == 0):
                self._dev_round()
            out_of_time = stop_after_s is not None and self._any(time.perf_counter() - started > stop_after_s)
            if last or out_of_time or (options.save_every and self.step % options.save_every == 0):
                self.save()
        self._log.end()
        self.accelerator.wait_for_everyone()
        return self.step == options.num_steps

    def close(self) -> None:
        """Leave the group of processes, if there is one; nothing can be trained afterwards."""
        # The wrapper goes first: were it the last to hold a gloo group, torch would tear the group down with the
        # interpreter's lock held, while the group's own thread may be waiting for that lock.
        del self.wrapped
        self.accelerator.free_memory()
        self.accelerator.state.destroy_process_group()

    def save(self) -> None:
        """Write what was trained as it stands, then the checkpoint."""
        if not self.accelerator.is_main_process:
            return
        # The checkpoint comes last: a run killed in between does its last steps again and writes the rest again.
        self._save_artefact()
        state = TrainState(
            self.step,
            self.trained.state_dict(),
            self.optimizer.state_dict(),
            self._identity(),
            self.tokens,
            self.seconds,
        )
        save_state(self.out, state)

    def _begin(self, resume: bool) -> None:
        require_folder(self.out)
        if not resume:
            refuse_overwriting(self.out)
        elif (state := load_state(self.out)) is not None:
            check_identity(self.out, state, self._identity())
            self.trained.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)
            self.step, self.tokens, self.seconds = state.step, state.tokens, state.seconds
        self._log.begin(self.step, self._recipe())

    def _figures(self, norm: Tensor | None) -> dict[str, Any]:
        """What every row of a step states."""
        cuda = self.device.type == "cuda"
        return {
            "grad_norm": None if norm is None else rounded(norm),
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens / max(self.seconds, 1e-9)),
            "peak_device_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else 0,
        }

    def _record(self, row: dict[str, Any]) -> None:
        self._log.record(row)
        if self.on_row is not None and self.accelerator.is_main_process:
            self.on_row(row)

    def _sum(self, own: int) -> int:
        if self.accelerator.num_processes == 1:  # a number that went by way of the GPU would wait for all its work
            return own
        return int(self.accelerator.reduce(torch.tensor(own, device=self.device), "sum"))

    def _any(self, own: bool) -> bool:
        return self._sum(int(own)) > 0


def rounded(value: Tensor) -> float | None:
    """Four decimals; None for NaN, which JSON doesn't know."""
    return None if bool(value.isnan()) else round(float(value), 4)
