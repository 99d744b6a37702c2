"""The stage-2 trainer: language modelling on retrieved pages, AdamW on an adapter or on all weights (paper eq 8, 9)."""

from __future__ import annotations

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

from ...engine.adapter import AdapterCard
from ...engine.model import RetroLM
from ...engine.text_loss import checkpoint_layers
from ...errors import UserError
from ..loop import TrainingLoop, rounded
from ..processes import new_accelerator, own_share
from ..recipe import model_name
from ..run_log import Log
from ..schedule import learning_rate
from .artefact import save_model
from .backbone import check_lengths
from .config import Stage2Recipe
from .pieces import PieceStream, held_out_pieces, num_prefix_tokens
from .step import Stage2Step, new_optimizer, retriever_digest

ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"


class Stage2Trainer(TrainingLoop[Tensor]):
    """Trains a backbone on sparse KV, or with full attention as a control.

    Args:
        recipe: data and training settings. lm: backbone and retriever; its adapter is the one that is trained.
        data_root: folder that the recipe's paths are relative to. out: folder for checkpoint, log and what was trained.
        log, trackers: as for `Stage1Trainer`.

    Raises:
        UserError: pieces that a model can't take, a share of `accumulate` that is no whole number, an unknown tracker,
        held-out documents that can't be read.
    """

    def __init__(
        self,
        recipe: Stage2Recipe,
        lm: RetroLM,
        data_root: Path,
        out: Path,
        log: Log | None = None,
        trackers: Sequence[Any] = (),
    ) -> None:
        self.recipe, self.lm, self.data_root = recipe, lm, data_root
        check_lengths(recipe, lm)
        train = recipe.train
        if train.deterministic:
            be_deterministic()
        super().__init__(
            "retrolm-stage2", new_accelerator(trackers, out, find_unused=False), train, out, lm.device, log
        )
        self._own_pieces = own_share(train.accumulate, self.accelerator.num_processes)
        self._held_out, self._never = held_out_pieces(recipe.data, lm.tokenizer, data_root)
        torch.manual_seed(train.seed)
        prefix = num_prefix_tokens(lm.tokenizer, recipe.data.prefix)
        self.step_module = self.trained = Stage2Step(lm, train, prefix, self._card()).to(lm.device)
        if train.checkpointing:
            checkpoint_layers(lm.model)
        optimizer = new_optimizer(self.step_module, train)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.step_module, optimizer)
        self._unread: list[tuple[int, Tensor]] = []  # steps and losses that nobody has looked at yet

    @property
    def artefact_folder(self) -> Path:
        """Where what was trained is written: an adapter, or a model with its retriever."""
        return self.out / (ADAPTER_FOLDER if self.step_module.adapter is not None else MODEL_FOLDER)

    @torch.no_grad()
    def dev_loss(self) -> float | None:
        """Mean loss of a held-out token, on pages chosen without knowledge of their tokens (D22); None without data."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for piece in self._held_out[self.accelerator.process_index :: self.accelerator.num_processes]:
            program = self.step_module.program(len(piece), causal=True)
            with self.step_module.running(program):
                loss = self.step_module(piece, program)
            sums += torch.stack([loss.double(), loss.new_tensor(self.step_module.num_losses(piece)).double()])
        loss, count = self.accelerator.reduce(sums, "sum")
        return rounded(loss / count) if float(count) else None

    # --- one step -----------------------------------------------------------------------------------------------

    def _one_step(self, batches: Iterator[Tensor]) -> None:
        started = time.perf_counter()
        taken = list(islice(batches, self._own_pieces))
        if self._any(len(taken) < self._own_pieces):
            raise UserError(
                f"The documents end at step {self.step}. Raise epochs in the [data] table, or add documents."
            )
        loss, norm = self.update(taken)
        self._unread.append((self.step, loss))
        self.step += 1
        self.tokens += self._sum(sum(map(len, taken)))
        self.seconds += time.perf_counter() - started
        if self.step % self.recipe.train.log_every == 0 or self.step == 1:
            self._check_losses()
            row = {"step": self.step, "loss": rounded(loss), "lr": self._rate(self.step - 1)}
            self._record({**row, **self._figures(norm)})

    def update(self, pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Move the weights once by this process's pieces; returns the mean loss of a token and the gradient's norm.

        Nothing here waits for the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        num_losses = self._sum(sum(map(self.step_module.num_losses, pieces)))
        losses = [self._accumulate(piece, num_losses, n == len(pieces)) for n, piece in enumerate(pieces, start=1)]
        norm = self.accelerator.clip_grad_norm_(self.step_module.parameters(), self.recipe.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.accelerator.reduce(torch.stack(losses).sum(), "sum") / num_losses, norm

    def save(self) -> None:
        self._check_losses()
        super().save()

    def _rate(self, step: int) -> float:
        train = self.recipe.train
        return learning_rate(step, train.num_steps, train.warmup, train.final_lr) * train.lr

    def _accumulate(self, piece: Tensor, num_losses: int, last: bool) -> Tensor:
        """Add a piece's gradients to those of the step's mean loss; processes exchange them with the last piece."""
        program = self.step_module.program(len(piece))
        processes = self.accelerator.num_processes  # whose gradients are averaged, not summed
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped), self.step_module.running(program):
            loss: Tensor = self.wrapped(piece, program)
            self.accelerator.backward(loss * (processes / num_losses))
        return loss.detach()

    def _check_losses(self) -> None:
        """Wait for the device, and raise `UserError` if a step's loss since the last check is no number.

        Nothing was saved since then.
        """
        steps, self._unread = self._unread, []
        if not steps:
            return
        started = time.perf_counter()
        means = torch.stack([loss for _, loss in steps]).tolist()
        self.seconds += time.perf_counter() - started
        for (step, _), loss in zip(steps, means, strict=True):
            if not math.isfinite(loss):
                raise UserError(f"The loss is {loss} at step {step}. Lower lr, or use dtype float32.")

    def _dev_round(self) -> None:
        self._check_losses()
        loss = self.dev_loss()
        self._details()["dev_loss"] = {"step": self.step, "loss": loss}
        self._record({"step": self.step, "dev_loss": loss})

    # --- parts --------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Tensor]:
        """This process's pieces from the present step on."""
        first = self.step * self.recipe.train.accumulate + self.accelerator.process_index
        stream = PieceStream(
            self.recipe.data,
            self.lm.tokenizer,
            self.data_root,
            first,
            self.accelerator.num_processes,
            self._never,
        )
        workers = self.recipe.train.num_workers
        return iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None))

    def _save_artefact(self) -> None:
        self._details().update(step=self.step, tokens=self.tokens, train_s=round(self.seconds, 1))
        adapter, frozen = self.step_module.adapter, self.step_module.frozen
        if adapter is not None:
            adapter.save(self.artefact_folder, self.recipe.train.bits)
        elif frozen is not None and self.step == self.recipe.train.num_steps:
            save_model(self.lm, frozen, self.step_module.bookmark, self._card_of_run, self.artefact_folder)  # type: ignore[arg-type]

    def _card(self) -> AdapterCard:
        train = self.recipe.train
        name = model_name(train.model)
        recipe = self.recipe.as_dict()
        recipe["train"]["model"] = name
        recipe["train"]["retriever"] = model_name(train.retriever)
        details = {"model": name, "retriever": self.lm.retriever_name, "recipe": recipe}
        kind = "stage2" if train.attention == "sparse" else "full-attention"
        self._card_of_run = AdapterCard(self.lm.backbone.fingerprint(), f"{os.path.basename(name)}-{kind}", details)
        return self._card_of_run

    def _details(self) -> dict[str, Any]:
        return self._card_of_run.details

    def _recipe(self) -> dict[str, Any]:
        return self.recipe.as_dict()

    def _identity(self) -> dict[str, Any]:
        return {
            **self.recipe.decisive(),
            "documents": _sizes(self.data_root, self.recipe.data.path),
            "held_out": _sizes(self.data_root, self.recipe.data.dev_path),
            "backbone": self._card_of_run.backbone,
            "retriever": retriever_digest(self.lm),
        }


def be_deterministic() -> None:
    """Ask PyTorch for kernels that repeat bit for bit; it raises where there are none.

    Where it only warns, attention's backward pass keeps its kernels that add up in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _sizes(root: Path, path: str) -> dict[str, int]:
    """Bytes of each file of documents."""
    if not path:
        return {}
    place = root / path
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    return {file.name: file.stat().st_size for file in files if file.is_file()}
