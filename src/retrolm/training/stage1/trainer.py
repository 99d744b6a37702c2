"""The stage-1 training loop: AdamW on the retriever, checkpoints, dev recall (paper A.8; D25)."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...engine.loading import freeze
from ...engine.model import RetroLM
from ...engine.sharding import is_sharded
from ...errors import UserError
from ...retriever import PageRetriever, RetrieverCard, load_retriever
from ..data.config import Stage1DataConfig
from ..data.dataset import Stage1Dataset
from ..data.mixture import text_length
from ..data.pool import read_manifest
from ..loop import TrainingLoop, rounded
from ..processes import new_accelerator, own_share
from ..recipe import model_name
from ..run_log import Log
from ..schedule import learning_rate
from ..worker_errors import from_workers, quiet_worker
from .ahead import ReadAhead, ReadBatch
from .backbone import check_sharing, check_window
from .batches import Collate, Stage1Batch, counted_words, micro_batches
from .config import Stage1Recipe, Stage1TrainConfig
from .held_out import dev_batches, dev_config, held_out_recall, hits_and_counts
from .step import Stage1Step, StepResult

RETRIEVER_FOLDER = "retriever"
_ENDLESS = 1 << 40


class Stage1Trainer(TrainingLoop[ReadBatch]):
    """Trains one page retriever.

    Args:
        recipe: data and training settings. lm: the backbone, frozen, with any config.
        pool: folder of the prepared pool; None where `loaded` gives batches of its own.
        out: folder for checkpoint, log and the finished retriever.
        log: called on the main process with a dict every `log_every` steps (also written to `log.jsonl`); may be set
            later as `on_row`.
        trackers: names of accelerate's trackers ("tensorboard", "wandb", …), or trackers.

    Raises:
        UserError: texts longer than the backbone's window, a share of `accumulate` that is no whole number, an unknown
        tracker, an unusable pool.
    """

    def __init__(
        self,
        recipe: Stage1Recipe,
        lm: RetroLM,
        pool: Path | None,
        out: Path,
        log: Log | None = None,
        trackers: Sequence[Any] = (),
    ) -> None:
        self.recipe, self.lm, self.pool = recipe, lm, pool
        # The last layer's value delta feeds no score.
        accelerator = new_accelerator(lm, trackers, out, find_unused=True)
        super().__init__("retrolm-stage1", accelerator, recipe.train, out, lm.device, log)
        check_window(recipe, lm)
        check_sharing(recipe, lm)
        if lm.config.bookmarks != recipe.train.bookmarks:
            raise UserError(
                f"The backbone reads bookmarks={lm.config.bookmarks!r}, the recipe {recipe.train.bookmarks!r}."
            )
        self._unread: list[tuple[int, Tensor]] = []  # steps whose losses were not looked at yet
        self._reading: ReadAhead | None = None
        self._own_batches = own_share(recipe.train.accumulate, self.accelerator.num_processes)
        freeze(lm.model)
        self.step_module = self.trained = Stage1Step(lm, self._first_retriever(), recipe.train).to(lm.device)
        betas, on_gpu = (0.9, recipe.train.beta2), lm.device.type == "cuda"
        optimizer = torch.optim.AdamW(self._groups(), lr=recipe.train.lr, betas=betas, fused=on_gpu or None)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.step_module, optimizer)

    def run(self, resume: bool = False, stop_after_s: float | None = None) -> bool:
        try:
            return super().run(resume, stop_after_s)
        finally:
            if self._reading is not None:
                self._reading.stop()

    @property
    def _pool(self) -> Path:
        assert self.pool is not None
        return self.pool

    @property
    def retriever_folder(self) -> Path:
        return self.out / RETRIEVER_FOLDER

    @property
    def retriever(self) -> PageRetriever:
        return self.step_module.retriever

    def dev_recall(self) -> dict[str, Any]:
        """Recall on the recipe's held-out questions, in `recall_pages` free pages; see `held_out_recall`."""
        train = self.recipe.train
        config = dev_config(self.recipe.data, train.dev_min_tokens, train.dev_max_tokens)
        data = Stage1Dataset(self._pool, self.lm.tokenizer, config, train.dev_samples, "dev")
        batches = dev_batches(config, train.dev_samples, train.tokens_per_batch)
        parts = self._collate(with_words=True), self.lm.device
        if is_sharded(self.lm.model):  # its passes are of all processes: each measures all
            return held_out_recall([self.step_module], data, batches, *parts)[0]
        return held_out_recall([self.step_module], data, self._own(batches), *parts, self._total)[0]

    def _save_artefact(self) -> None:
        self.retriever.card.details.update(step=self.step, tokens=self.tokens, train_s=round(self.seconds, 1))
        self.step_module.kept.save(self.retriever_folder)

    def _recipe(self) -> dict[str, Any]:
        return self.recipe.as_dict()

    # --- one step -----------------------------------------------------------------------------------------------

    def _one_step(self, batches: ReadAhead) -> None:  # type: ignore[override]
        started = time.perf_counter()
        if self.step == 0 and self.recipe.train.calibrate:
            self._calibrate(batches.peek(self._own_batches))
        results, norm = self.update(batches, more=self.step + 1 < self.recipe.train.num_steps)
        self._unread.append((self.step, torch.stack([result.loss for result in results])))
        self.tokens += self._sum(sum(result.num_tokens for result in results))
        self.step += 1
        self.seconds += time.perf_counter() - started
        if self.step % self.recipe.train.log_every == 0 or self.step == 1:
            self._check_losses()
            self._record_step(results, norm)

    def update(self, batches: ReadAhead, more: bool) -> tuple[list[StepResult], Tensor | None]:
        """Move the weights once by this process's share of the batches; returns results and the gradient's norm.

        Nothing here waits for the device: the next step is prepared while this one is computed.

        Args:
            more: another step follows, whose first batch may be read already.
        """
        own = self._own_batches
        results = [self._accumulate(batches, number == own, more) for number in range(1, own + 1)]
        return results, self.move_weights()

    def move_weights(self) -> Tensor | None:
        """Clip the gathered gradients, follow them, and drop them; returns their norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate(self.step)
        norm = self.accelerator.clip_grad_norm_(self.step_module.parameters(), self.recipe.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_module.follow(self.step)
        return norm

    def save(self) -> None:
        self._check_losses()
        super().save()

    def _rate(self, step: int) -> float:
        train = self.recipe.train
        return learning_rate(step, train.num_steps, train.warmup, train.final_lr)

    def _accumulate(self, batches: ReadAhead, last: bool, more: bool) -> StepResult:
        """Add a batch's gradients; processes exchange them with the last batch of a step."""
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            read = next(batches)
            result: StepResult = self.wrapped(read.batch, read.frozen)
            del read  # the graph holds what it needs; the rest makes room for the next batch
            if more or not last:
                batches.begin()
            self.accelerator.backward(result.loss / self._own_batches)
        result.loss = result.loss.detach()
        return result

    def _check_losses(self) -> None:
        """Wait for the device, and raise `UserError` if a step's loss since the last check is no number.

        Nothing was saved since then.
        """
        steps, self._unread = self._unread, []
        if not steps:
            return
        started = time.perf_counter()
        means = torch.stack([losses.mean() for _, losses in steps]).tolist()
        self.seconds += time.perf_counter() - started
        for (step, _), loss in zip(steps, means, strict=True):
            if not math.isfinite(loss):
                raise UserError(f"The loss is {loss} at step {step}. Lower lr, or use dtype float32.")

    @torch.no_grad()
    def _calibrate(self, batches: list[Stage1Batch]) -> None:
        spreads = torch.stack([self.step_module(batch).spreads_L for batch in batches]).mean(0)
        self.step_module.calibrate(self.accelerator.reduce(spreads, "mean"))

    def _record_step(self, results: list[StepResult], norm: Tensor | None) -> None:
        loss = self.accelerator.reduce(torch.stack([result.loss for result in results]).mean(), "mean")
        hits = self._total(torch.stack([hits_and_counts(result) for result in results]).sum(0))
        recall = (hits[:, 0] / hits[:, 1]).cpu()
        self._record(
            {
                "step": self.step,
                "loss": rounded(loss),
                "recall8": rounded(recall.mean()),
                "recall8_best": rounded(recall.max()),
                "lr": self._rate(self.step - 1) * self.recipe.train.lr,
                **self._figures(norm),
            }
        )

    def _dev_round(self) -> None:
        self._check_losses()
        found = self.dev_recall()
        self.retriever.card.details["dev_recall"] = {"step": self.step, **found}
        self._record({"step": self.step, "dev_recall": found})

    # --- processes ----------------------------------------------------------------------------------------------

    def _total(self, counts: Tensor) -> Tensor:
        """Counts summed over all processes."""
        found: Tensor = self.accelerator.reduce(counts, "sum")
        return found

    def _own(self, everything: Iterator[list[int]], first: int = 0) -> Iterator[list[int]]:
        """This process's batches of sample indices from number `first` on; batch b belongs to process b mod n."""
        return islice(everything, first + self.accelerator.process_index, None, self.accelerator.num_processes)

    # --- parts --------------------------------------------------------------------------------------------------

    def _first_retriever(self) -> PageRetriever:
        train, manifest = self.recipe.train, {} if self.pool is None else read_manifest(self.pool)
        torch.manual_seed(train.seed)
        retriever = first_retriever(self.lm, train)
        recipe = self.recipe.as_dict()
        recipe["train"]["model"] = model_name(train.model)
        retriever.card.details.update(
            recipe=recipe, data={key: manifest.get(key) for key in ("num_questions", "num_books", "licences")}
        )
        return retriever.to(self.lm.device)

    def _groups(self) -> list[dict[str, Any]]:
        train, module = self.recipe.train, self.step_module
        deltas = list(module.retriever.deltas.parameters())
        return [
            {"params": deltas, "peak": train.lr, "weight_decay": train.weight_decay},
            {"params": [module.retriever.embedding], "peak": train.embedding_lr, "weight_decay": 0.0},
            {
                "params": [module.log_scales, module.agreed_log_scale],
                "peak": train.temperature_lr,
                "weight_decay": 0.0,
            },
        ]

    def _collate(self, with_words: bool = False) -> Collate:
        train = self.recipe.train
        words = counted_words(self.lm, train) if with_words else None
        return Collate(train.page_size, self.lm.pad_id, train.batch_negatives > 0, words)

    def batches(self) -> ReadAhead:
        """This process's batches from the present step on, each read by the backbone."""
        return self.reading(self.loaded())

    def reading(self, batches: Iterator[Stage1Batch], ahead: bool | None = None) -> ReadAhead:
        """Batches read by the backbone; see `ReadAhead`. `run` stops what it began."""
        apart = self.step_module.reads_alike and not is_sharded(self.lm.model)  # its passes must come one by one
        ahead = ahead if apart else False
        self._reading = ReadAhead(batches, self.step_module.read, self.lm.device, ahead)
        return self._reading

    def loaded(self) -> Iterator[Stage1Batch]:
        """This process's batches from the present step on, on the host."""
        train = self.recipe.train
        data = Stage1Dataset(self._pool, self.lm.tokenizer, self.recipe.data, _ENDLESS)
        everything = micro_batches(_lengths(self.recipe.data, _ENDLESS), train.tokens_per_batch)
        loader = DataLoader(
            data,
            batch_sampler=self._own(everything, self.step * train.accumulate),
            collate_fn=self._collate(with_words=train.agreed_share > 0),
            num_workers=train.num_workers,
            prefetch_factor=4 if train.num_workers else None,
            pin_memory=self.lm.device.type == "cuda",
            worker_init_fn=quiet_worker,
        )
        return from_workers(loader)

    def _identity(self) -> dict[str, Any]:
        manifest = (self._pool / "manifest.json").read_bytes()
        return {
            **self.recipe.decisive(),
            "pool": hashlib.sha256(manifest).hexdigest(),
            "backbone": self.lm.backbone.fingerprint(),
        }


def first_retriever(lm: RetroLM, train: Stage1TrainConfig) -> PageRetriever:
    """The retriever a run starts from: a copy of the backbone's projections, or a trained one (`init_from`)."""
    shapes, fingerprint = lm.backbone.projection_shapes(), lm.backbone.fingerprint()
    name = f"{os.path.basename(model_name(train.model))}-stage1"
    if not train.init_from:
        return PageRetriever(
            shapes, lm.untrained_bookmark(), RetrieverCard(fingerprint, train.rank, train.page_size, name)
        )
    retriever = load_retriever(train.init_from, shapes, fingerprint)
    before = retriever.card
    if before.rank != train.rank:
        raise UserError(f"{train.init_from} has rank {before.rank}, the recipe {train.rank}. Make them equal.")
    retriever.card = RetrieverCard(fingerprint, train.rank, train.page_size, name, {"init_from": before.details})
    return retriever


def _lengths(config: Stage1DataConfig, num_samples: int) -> Iterator[int]:
    return (text_length(config, index) for index in range(num_samples))
