"""The stage-1 training loop: AdamW on the retriever, checkpoints, dev recall (paper A.8; D25)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader

from ...engine.model import RetroLM
from ...errors import UserError
from ...retriever import PageRetriever, RetrieverCard, load_retriever
from ..data.dataset import Stage1Dataset
from ..data.mixture import text_length
from .batches import Collate, Stage1Batch, micro_batches
from .checkpoint import TrainState, load_state, save_state
from .config import Stage1Recipe, Stage1TrainConfig
from .step import Stage1Step, StepResult

Log = Callable[[dict[str, Any]], None]


class Stage1Trainer:
    """Trains one page retriever.

    Args:
        recipe: data and training settings. lm: the backbone, frozen, with any config.
        pool: folder of the prepared pool. out: folder for checkpoint, log and the finished retriever.
        log: called with a dict every `log_every` steps (also written to `log.jsonl`).
    """

    def __init__(self, recipe: Stage1Recipe, lm: RetroLM, pool: Path, out: Path, log: Log | None = None) -> None:
        self.recipe, self.lm, self.pool, self.out = recipe, lm, pool, out
        self._log = log
        lm.model.requires_grad_(False)
        # The last layer's value delta feeds no score, so it never gets a gradient.
        self.accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
        train = recipe.train
        torch.manual_seed(train.seed)
        retriever = first_retriever(lm, train).to(lm.device)
        self.step_module = Stage1Step(lm, retriever, train.num_skip_layers, train.learn_temperature).to(lm.device)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=train.lr, betas=(0.9, train.beta2))
        self.wrapped, self.optimizer = self.accelerator.prepare(self.step_module, self.optimizer)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0

    @property
    def retriever(self) -> PageRetriever:
        return self.step_module.retriever

    def run(self, resume: bool = False, stop_after_s: float | None = None) -> bool:
        """Train to the last step, or for about `stop_after_s` seconds.

        Args:
            resume: go on from the checkpoint in `out`; the outcome is that of an uninterrupted run.

        Returns:
            Whether the run is complete (the retriever is then saved in `out/retriever`).
        """
        if resume:
            self._restore()
        started = time.perf_counter()
        train = self.recipe.train
        batches = self._batches()
        while self.step < train.num_steps:
            self._one_step(batches)
            last = self.step == train.num_steps
            if train.dev_every and (last or self.step % train.dev_every == 0):
                self._record({"step": self.step, "dev_recall": self.dev_recall()})
            out_of_time = stop_after_s is not None and time.perf_counter() - started > stop_after_s
            if last or out_of_time or (train.save_every and self.step % train.save_every == 0):
                self.save()
            if out_of_time and not last:
                return False
        return True

    def save(self) -> None:
        """Write the checkpoint and the retriever as it stands."""
        if not self.accelerator.is_main_process:
            return
        state = TrainState(
            self.step,
            self.step_module.state_dict(),
            self.optimizer.state_dict(),
            json.loads(json.dumps(self.recipe.as_dict())),
            self.tokens,
            self.seconds,
        )
        save_state(self.out, state)
        self.retriever.card.details.update(step=self.step, tokens=self.tokens, train_s=round(self.seconds, 1))
        self.retriever.card.details["recipe"] = state.recipe
        self.retriever.save(self.out / "retriever")

    @torch.no_grad()
    def dev_recall(self) -> dict[str, float]:
        """Recall in 8 pages on held-out questions, mean over layers and best layer."""
        data = Stage1Dataset(self.pool, self.lm.tokenizer, self.recipe.data, self.recipe.train.dev_samples, "dev")
        collate = self._collate()
        total, count = torch.zeros(len(self.step_module.layers)), 0
        for indices in micro_batches(_lengths(self.recipe, len(data)), self.recipe.train.tokens_per_batch):
            result = self.step_module(collate([data[i] for i in indices]).to(self.lm.device))
            total += result.layer_recalls.cpu() * len(indices)
            count += len(indices)
        recall = total / count
        return {"mean": round(float(recall.mean()), 4), "best": round(float(recall.max()), 4)}

    def _one_step(self, batches: Iterator[Stage1Batch]) -> None:
        started = time.perf_counter()
        train = self.recipe.train
        rate = learning_rate(self.step, train.num_steps, train.warmup, train.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        own = max(1, train.accumulate // self.accelerator.num_processes)
        result: StepResult | None = None
        for number, batch in enumerate(islice(batches, own), start=1):
            batch = batch.to(self.lm.device)
            result = self._forward(batch)
            with self._no_sync(number < own):
                self.accelerator.backward(result.loss / own)
            self.tokens += batch.pages.num_tokens * self.accelerator.num_processes
        assert result is not None
        norm = self.accelerator.clip_grad_norm_(self.step_module.parameters(), train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - started
        if self.step % train.log_every == 0 or self.step == 1:
            self._log_step(result, norm, rate)

    def _forward(self, batch: Stage1Batch) -> StepResult:
        if self.step == 0 and self.recipe.train.calibrate and not bool(self.step_module.log_scales.any()):
            with torch.no_grad():
                spreads = self.step_module(batch).layer_spreads
            self.step_module.calibrate(self.accelerator.reduce(spreads, "mean"))
        result: StepResult = self.wrapped(batch)
        if not bool(torch.isfinite(result.loss)):
            raise UserError(f"The loss is {float(result.loss)} at step {self.step}. Lower lr, or use dtype bfloat16.")
        return result

    def _no_sync(self, skip: bool) -> Any:
        return self.accelerator.no_sync(self.wrapped) if skip else nullcontext()

    def _groups(self) -> list[dict[str, Any]]:
        train = self.recipe.train
        deltas = list(self.step_module.retriever.deltas.parameters())
        return [
            {"params": deltas, "peak": train.lr, "weight_decay": train.weight_decay},
            {"params": [self.step_module.retriever.embedding], "peak": train.embedding_lr, "weight_decay": 0.0},
            {"params": [self.step_module.log_scales], "peak": 1e-2, "weight_decay": 0.0},
        ]

    def _collate(self) -> Collate:
        return Collate(self.recipe.train.page_size, self.lm.pad_id)

    def _batches(self) -> Iterator[Stage1Batch]:
        """This process's batches from the present step on; batch b belongs to process b mod processes."""
        train = self.recipe.train
        num_samples = 1 << 40
        data = Stage1Dataset(self.pool, self.lm.tokenizer, self.recipe.data, num_samples)
        everything = micro_batches(_lengths(self.recipe, num_samples), train.tokens_per_batch)
        processes, own = self.accelerator.num_processes, self.accelerator.process_index
        first = self.step * max(train.accumulate, processes)
        mine = islice(everything, first + own, None, processes)
        loader = DataLoader(
            data,
            batch_sampler=mine,  # type: ignore[arg-type]
            collate_fn=self._collate(),
            num_workers=train.num_workers,
            pin_memory=self.lm.device.type == "cuda",
            prefetch_factor=4 if train.num_workers else None,
        )
        return iter(loader)

    def _restore(self) -> None:
        state = load_state(self.out)
        if state is None:
            return
        if state.recipe != json.loads(json.dumps(self.recipe.as_dict())):
            raise UserError(f"The checkpoint in {self.out} belongs to another recipe. Use another folder.")
        self.step_module.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        self.step, self.tokens, self.seconds = state.step, state.tokens, state.seconds

    def _log_step(self, result: StepResult, norm: Tensor | None, rate: float) -> None:
        device = self.lm.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        self._record(
            {
                "step": self.step,
                "loss": round(float(result.loss), 4),
                "recall8": round(float(result.layer_recalls.mean()), 3),
                "recall8_best": round(float(result.layer_recalls.max()), 3),
                "grad_norm": round(float(norm), 3) if norm is not None else None,
                "lr": rate * self.recipe.train.lr,
                "tokens": self.tokens,
                "tokens_per_s": round(self.tokens / max(self.seconds, 1e-9)),
                "peak_device_bytes": memory,
            }
        )

    def _record(self, row: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._log is not None:
            self._log(row)


def first_retriever(lm: RetroLM, train: Stage1TrainConfig) -> PageRetriever:
    """The retriever a run starts from: a copy of the backbone's projections, or a trained one (`init_from`)."""
    shapes, fingerprint = lm.backbone.projection_shapes(), lm.backbone.fingerprint()
    if not train.init_from:
        card = RetrieverCard(fingerprint, train.rank, train.page_size)
        return PageRetriever(shapes, lm.untrained_bookmark(), card)
    retriever = load_retriever(train.init_from, shapes, fingerprint)
    if retriever.card.rank != train.rank:
        raise UserError(f"{train.init_from} has rank {retriever.card.rank}, the recipe {train.rank}. Make them equal.")
    retriever.card.details = {"init_from": retriever.card.details}
    return retriever


def learning_rate(step: int, num_steps: int, warmup: float, final: float) -> float:
    """Share of the peak rate at a step: linear rise, then cosine decay to `final`."""
    rising = max(1, round(warmup * num_steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, num_steps - rising)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def _lengths(recipe: Stage1Recipe, num_samples: int) -> Iterator[int]:
    return (text_length(recipe.data, index) for index in range(num_samples))
