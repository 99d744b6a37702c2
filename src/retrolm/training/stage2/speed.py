"""Training speed and memory: sparse KV beside full attention, in one process and in interleaved pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...engine.adapter import AdapterCard
from ...engine.sparse_pass import SparseProgram
from ...engine.text_loss import checkpoint_layers, sparse_program
from ..piece_step import new_optimizer
from .backbone import load_backbone
from .config import Stage2Recipe, Stage2TrainConfig
from .step import Stage2Step

PARTS = ("forward", "backward", "optimiser")
CHECK_TOKENS = 999
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}


def load_step(recipe: Stage2Recipe) -> Stage2Step:
    """Backbone and adapter (or all weights) of a recipe, ready for passes; raises `UserError`."""
    lm = load_backbone(recipe)
    step = Stage2Step(lm, recipe.train, 0, AdapterCard(lm.backbone.fingerprint())).to(lm.device)
    if recipe.train.checkpointing:
        checkpoint_layers(lm.model)
    return step


def measure_speed(
    step: Stage2Step,
    train: Stage2TrainConfig,
    lengths: Sequence[int],
    repeats: int,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Time forward and backward passes over random tokens; one warm-up pass of each kind per length.

    Returns:
        "equal": whether sparse and full attention give one loss where the budget holds the text, "check_losses" both
        losses, "rows": per length and kind tokens/s (median, and all), peak memory and "parts", and the speed-up (None
        if not equal). The parts are those of a step on one more text: for each of `PARTS` seconds, with the device
        waited for before and after, and host_s, the time until its work was handed to the device (as long as `seconds`
        where launching is what takes the time).
    """
    losses = _check(step, train)
    equal = abs(losses[0] - losses[1]) <= TOLERANCE[train.dtype] * losses[1]
    rows = []
    for num_tokens in lengths:
        row = _row(step, train, num_tokens, repeats)
        row["speed_up"] = row["sparse"]["tokens_per_s"] / row["full"]["tokens_per_s"] if equal else None
        rows.append(row)
        on_row(row)
    shape = {"kv_budget": train.kv_budget, "page_size": train.page_size, "weights": train.weights, "dtype": train.dtype}
    return {"model": train.model, **shape, "equal": equal, "check_losses": losses, "rows": rows}


def _row(step: Stage2Step, train: Stage2TrainConfig, num_tokens: int, repeats: int) -> dict[str, Any]:
    found: dict[str, list[tuple[float, int]]] = {"sparse": [], "full": []}
    for turn in range(repeats + 1):
        for kind, runs in found.items():
            piece = _random_piece(step, num_tokens, turn)
            program = _program(step, train, num_tokens) if kind == "sparse" else None
            measured = _timed(step, piece, program)
            if turn:
                runs.append(measured)
    figures = {kind: _figures(num_tokens, runs) for kind, runs in found.items()}
    for kind in figures:
        figures[kind]["parts"] = _parts(step, train, num_tokens, kind)
    return {"num_tokens": num_tokens, **figures}


def _figures(num_tokens: int, runs: list[tuple[float, int]]) -> dict[str, Any]:
    speeds = [num_tokens / seconds for seconds, _ in runs]
    return {
        "tokens_per_s": statistics.median(speeds),
        "all_tokens_per_s": speeds,
        "peak_device_bytes": max(peak for _, peak in runs),
    }


def _parts(step: Stage2Step, train: Stage2TrainConfig, num_tokens: int, kind: str) -> dict[str, dict[str, float]]:
    """Seconds of each part of a step on one text, which leaves the weights as they are."""
    piece = _random_piece(step, num_tokens, 0)
    made: dict[str, Tensor] = {}
    optimizer = new_optimizer(step, train)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    found: dict[str, dict[str, float]] = {}
    for _ in range(2):  # the first time the optimiser makes room for its averages
        program = _program(step, train, num_tokens) if kind == "sparse" else None
        works: list[Callable[[], Any]] = [
            partial(_keep_loss, made, step, piece, program),
            lambda: made.pop("loss").backward(),
            lambda: _move(step, train, optimizer),
        ]
        with step.running(program):
            found = {name: _seconds(step, work) for name, work in zip(PARTS, works, strict=True)}
    return found


def _keep_loss(made: dict[str, Tensor], step: Stage2Step, piece: Tensor, program: SparseProgram | None) -> None:
    made["loss"] = step(piece, program)


def _move(step: Stage2Step, train: Stage2TrainConfig, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(step.parameters(), train.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def _seconds(step: Stage2Step, work: Callable[[], Any]) -> dict[str, float]:
    step.lm.wait()
    started = time.perf_counter()
    work()
    host_s = time.perf_counter() - started
    step.lm.wait()
    return {"seconds": time.perf_counter() - started, "host_s": host_s}


def _timed(step: Stage2Step, piece: Tensor, program: SparseProgram | None) -> tuple[float, int]:
    """Seconds of one forward and backward pass, and the most device memory in use."""
    cuda = step.lm.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(step.lm.device)
        torch.cuda.synchronize(step.lm.device)
    started = time.perf_counter()
    with step.running(program):
        loss = step(piece, program)
        loss.backward()
    if cuda:
        torch.cuda.synchronize(step.lm.device)
    seconds = time.perf_counter() - started
    step.zero_grad()
    return seconds, torch.cuda.max_memory_allocated(step.lm.device) if cuda else 0


@torch.no_grad()
def _check(step: Stage2Step, train: Stage2TrainConfig) -> tuple[float, float]:
    """Mean loss of random tokens: through gathered sets with a budget that holds them, and by full attention."""
    piece = _random_piece(step, CHECK_TOKENS, 0)
    room = train.engine_config().replace(kv_budget=max(CHECK_TOKENS + train.page_size, train.kv_budget))
    program = sparse_program(step.lm, room, CHECK_TOKENS, dense_block=False)
    with step.running(program):
        sparse = float(step(piece, program))
    return sparse / (CHECK_TOKENS - 1), float(step(piece, None)) / (CHECK_TOKENS - 1)


def _program(step: Stage2Step, train: Stage2TrainConfig, num_tokens: int) -> SparseProgram:
    config = train.engine_config()
    return sparse_program(step.lm, config, num_tokens, detach_pages=train.detach_pages, frozen=step.frozen)


def _random_piece(step: Stage2Step, num_tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = step.lm.model.get_input_embeddings().num_embeddings
    return torch.randint(size, (num_tokens,), generator=generator)
