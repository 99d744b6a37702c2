"""What training costs beside a plain forward pass of the same backbone over the same batches, and where it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .ahead import ReadAhead
from .batches import Stage1Batch
from .trainer import Stage1Trainer

PARTS = ("copying", "frozen_pass", "bookmarks", "losses", "backward", "optimiser")
Figures = dict[str, Any]


def training_speed(trainer: Stage1Trainer, num_batches: int) -> Figures:
    """Time training steps straight from the loader, then plain forward passes, then a step's parts one by one.

    Args:
        num_batches: optimiser steps; one more goes before, unmeasured.

    Texts with all their questions count as tokens.

    Returns:
        num_tokens, num_batches, and
        "training": seconds, tokens_per_s, peak_device_bytes, and data_wait_s, spent on waiting for the loader (on a GPU
            while gradients are computed, as long as there are any);
        "forward", "forward_again": the same of the stock model, which may plan its kernels anew for each batch's shape
            the first time, as it would on fresh batches, and has them the second time;
        "training_in_turn": training without reading ahead (see `ReadAhead`), over the same batches, kept in memory;
        "overhead", "overhead_again": how much longer training takes than either, as a share of it;
        "parts": for each of `PARTS` seconds, with the device waited for before and after, and host_s, the time until
            its work was handed to the device (as long as `seconds` where launching is what takes the time). Taken
            apart they add up to more than a step, in which the host works ahead.
    """
    loader = _Loader(trainer.loaded())
    batches = trainer.reading(loader)
    trainer.update(batches, more=False)
    _forward(trainer, [batch.to(trainer.lm.device) for batch in loader.taken])
    num_before, loader.waited_s = len(loader.taken), 0.0
    found: Figures = {"training": _timed(trainer, lambda: _train(trainer, batches, num_batches))}
    batches.stop()
    found["training"]["data_wait_s"] = loader.waited_s
    taken = loader.taken[num_before:]
    there = [batch.to(trainer.lm.device) for batch in taken]
    found |= {name: _timed(trainer, lambda: _forward(trainer, there)) for name in ("forward", "forward_again")}
    in_turn = trainer.reading(iter(taken), ahead=False)
    found["training_in_turn"] = _timed(trainer, lambda: _train(trainer, in_turn, num_batches))
    num_tokens = sum(batch.pages.num_tokens for batch in taken)
    for figures in found.values():
        figures["tokens_per_s"] = num_tokens / figures["seconds"]
    spent = found["training"]["seconds"]
    found["overhead"] = spent / found["forward"]["seconds"] - 1
    found["overhead_again"] = spent / found["forward_again"]["seconds"] - 1
    return {"num_tokens": num_tokens, "num_batches": num_batches, **found, "parts": _parts(trainer, taken)}


class _Loader(Iterator[Stage1Batch]):
    """A loader's batches; keeps them, and how long it was waited for."""

    def __init__(self, batches: Iterator[Stage1Batch]) -> None:
        self._batches = batches
        self.taken: list[Stage1Batch] = []
        self.waited_s = 0.0

    def __next__(self) -> Stage1Batch:
        started = time.perf_counter()
        self.taken.append(next(self._batches))
        self.waited_s += time.perf_counter() - started
        return self.taken[-1]


def _train(trainer: Stage1Trainer, batches: ReadAhead, num_steps: int) -> None:
    for step in range(1, num_steps + 1):
        trainer.update(batches, more=step < num_steps)


@torch.no_grad()
def _forward(trainer: Stage1Trainer, batches: Iterable[Stage1Batch]) -> None:
    for batch in batches:
        trainer.lm.backbone.decoder(input_ids=batch.pages.tokens_BT, use_cache=False)


def _parts(trainer: Stage1Trainer, batches: Iterable[Stage1Batch]) -> dict[str, Figures]:
    """Seconds of each part of a step, summed over the batches."""
    found = {name: {"seconds": 0.0, "host_s": 0.0} for name in PARTS}
    for batch in batches:
        for name, work in zip(PARTS, _works(trainer, batch), strict=True):
            _wait(trainer)
            started = time.perf_counter()
            work()
            found[name]["host_s"] += time.perf_counter() - started
            _wait(trainer)
            found[name]["seconds"] += time.perf_counter() - started
    return found


def _works(trainer: Stage1Trainer, batch: Stage1Batch) -> Iterator[Callable[[], None]]:
    """The parts of a step on one batch; each is to be done before the next is asked for."""
    module, made = trainer.step_module, {}

    def keep(name: str, make: Callable[[], Any]) -> Callable[[], None]:
        return lambda: made.update({name: make()})

    yield keep("batch", lambda: batch.to(trainer.lm.device))
    yield keep("frozen", lambda: module.read(made["batch"]))
    yield keep("scores", lambda: module.scores(made["batch"], made["frozen"]))
    yield keep("result", lambda: module.judge(made["batch"], made["scores"], made["frozen"]))
    yield lambda: made["result"].loss.backward()
    yield keep("norm", trainer.move_weights)


def _timed(trainer: Stage1Trainer, work: Callable[[], None]) -> Figures:
    """Seconds of `work`, and the most device memory in use."""
    on_gpu = trainer.lm.device.type == "cuda"
    _wait(trainer)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.lm.device)
    started = time.perf_counter()
    work()
    _wait(trainer)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(trainer.lm.device) if on_gpu else 0
    return {"seconds": seconds, "peak_device_bytes": peak}


def _wait(trainer: Stage1Trainer) -> None:
    if trainer.lm.device.type == "cuda":
        torch.cuda.synchronize(trainer.lm.device)
