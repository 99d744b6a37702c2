"""What training costs beside a plain forward pass of the same backbone over the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch

from .batches import Stage1Batch
from .trainer import Stage1Trainer


def training_speed(trainer: Stage1Trainer, num_batches: int) -> dict[str, Any]:
    """Time forward passes of the stock backbone and whole training steps, in turn, batch by batch.

    One more batch goes before, unmeasured. Texts with all their questions count as tokens of both.

    Returns:
        num_tokens, and for "forward" and "training" seconds, tokens_per_s and peak_device_bytes; overhead = how much
        longer training takes, as a share of the forward pass.
    """
    batches = list(islice(trainer.batches(), num_batches + 1))
    seconds, peaks = {"forward": 0.0, "training": 0.0}, {"forward": 0, "training": 0}
    for number, batch in enumerate(batches):
        on_device = batch.to(trainer.lm.device)
        for name, work in (("forward", _forward), ("training", _train)):
            took, peak = _timed(trainer, on_device, work)
            if number:
                seconds[name] += took
                peaks[name] = max(peaks[name], peak)
    num_tokens = sum(batch.pages.num_tokens for batch in batches[1:])
    found: dict[str, Any] = {"num_tokens": num_tokens, "num_batches": num_batches}
    for name, took in seconds.items():
        found[name] = {"seconds": took, "tokens_per_s": num_tokens / took, "peak_device_bytes": peaks[name]}
    return {**found, "overhead": seconds["training"] / seconds["forward"] - 1}


@torch.no_grad()
def _forward(trainer: Stage1Trainer, batch: Stage1Batch) -> None:
    trainer.lm.backbone.decoder(input_ids=batch.pages.tokens_BT, use_cache=False)


def _train(trainer: Stage1Trainer, batch: Stage1Batch) -> None:
    trainer.step_module(batch).loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def _timed(
    trainer: Stage1Trainer, batch: Stage1Batch, work: Callable[[Stage1Trainer, Stage1Batch], None]
) -> tuple[float, int]:
    device = trainer.lm.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    work(trainer, batch)
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) if on_gpu else 0
