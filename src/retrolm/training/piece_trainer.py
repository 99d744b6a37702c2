"""Training on pieces of documents by language modelling: steps, held-out loss, order. What attends is the step's."""

from __future__ import annotations

import math
import os
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..engine.adapter import AdapterCard
from ..engine.model import RetroLM
from ..engine.sharding import is_sharded
from ..engine.text_loss import checkpoint_layers
from ..errors import UserError
from .document_pieces import PieceStream, held_out_pieces
from .loop import TrainingLoop, rounded
from .piece_config import PieceTrainConfig
from .piece_step import PieceStep, new_optimizer
from .processes import new_accelerator, own_share
from .recipe import Recipe, model_name
from .run_log import Log
from .schedule import learning_rate
from .worker_errors import from_workers, quiet_worker


class PieceTrainer(TrainingLoop[Tensor]):
    """Base of the trainers on pieces. What is trained is made by `_new_step`, once everything else is known.

    Args:
        name: project name for trackers. recipe: with a `PieceTrainConfig` and a `PieceDataConfig`.
        lm: backbone and retriever; its adapter is the one that is trained.
        data_root: folder that the recipe's paths are relative to. out: folder for checkpoint, log and what was trained.
        log, trackers: as for `Stage1Trainer`.

    Raises:
        UserError: a share of `accumulate` that is no whole number, an unknown tracker, held-out documents that can't be
        read.
    """

    step_module: PieceStep
    pieces_per_pass: int | None = None  # None = one piece [T]

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        lm: RetroLM,
        data_root: Path,
        out: Path,
        log: Log | None = None,
        trackers: Sequence[Any] = (),
    ) -> None:
        self.recipe, self.lm, self.data_root = recipe, lm, data_root
        train: PieceTrainConfig = recipe.train
        if train.deterministic:
            be_deterministic()
        super().__init__(name, new_accelerator(lm, trackers, out, find_unused=False), train, out, lm.device, log)
        self._own_passes = own_share(train.accumulate, self.accelerator.num_processes)
        self._held_out, self._never = held_out_pieces(recipe.data, lm.tokenizer, data_root)
        torch.manual_seed(train.seed)
        self.step_module = self.trained = self._new_step().to(lm.device)
        if self.step_module.apart is not None:
            self.trained = nn.ModuleDict({"step": self.step_module, "apart": self.step_module.apart})
        if train.checkpointing:
            checkpoint_layers(lm.model)
        optimizer = new_optimizer(self.step_module, train)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.step_module, optimizer)
        self._unread: list[tuple[int, Tensor]] = []  # steps and losses that nobody has looked at yet

    @abstractmethod
    def _new_step(self) -> PieceStep:
        """What is trained; weights are drawn from torch's seed."""

    @torch.no_grad()
    def dev_loss(self) -> float | None:
        """Mean loss of a held-out token, with nothing chosen by knowledge of it (D22); None without data."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        # A sharded backbone's passes are of all processes: each measures all, which leaves the mean as it is.
        share = 1 if is_sharded(self.lm.model) else self.accelerator.num_processes
        for piece in self._held_out[self.accelerator.process_index % share :: share]:
            program = self.step_module.program(piece.shape[-1], causal=True)
            with self.step_module.running(program):
                loss = self.step_module(piece, program)
            sums += torch.stack([loss.double(), loss.new_tensor(self.step_module.num_losses(piece)).double()])
        loss, count = self.accelerator.reduce(sums, "sum")
        return rounded(loss / count) if float(count) else None

    # --- one step -----------------------------------------------------------------------------------------------

    def _one_step(self, batches: Iterator[Tensor]) -> None:
        started = time.perf_counter()
        taken = list(islice(batches, self._own_passes))
        if self._any(len(taken) < self._own_passes):
            raise UserError(
                f"The documents end at step {self.step}. Raise epochs in the [data] table, or add documents."
            )
        loss, norm = self.update(taken)
        self._unread.append((self.step, loss))
        self.step += 1
        self.tokens += self._sum(sum(piece.numel() for piece in taken))
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
            group["lr"] = self._rate(self.step) * group.get("share", 1.0)
        num_losses = self._sum(sum(map(self.step_module.num_losses, pieces)))
        losses = [self._accumulate(piece, num_losses, n == len(pieces)) for n, piece in enumerate(pieces, start=1)]
        norm = self.accelerator.clip_grad_norm_(self.step_module.parameters(), self.recipe.train.max_grad_norm)
        if self.step_module.apart is not None:
            self._share(list(self.step_module.apart.parameters()))
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
        program = self.step_module.program(piece.shape[-1])
        processes = self.accelerator.num_processes  # whose gradients are averaged, not summed
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped), self.step_module.running(program):
            loss: Tensor = self.wrapped(piece, program)
            self.accelerator.backward(loss * (processes / num_losses))
        self.step_module.after_backward(program)
        return loss.detach()

    def _share(self, parameters: list[nn.Parameter]) -> None:
        """Average gradients over the processes, and clip them by themselves."""
        for value in parameters:
            value.grad = self.accelerator.reduce(value.grad, "mean")
        torch.nn.utils.clip_grad_norm_(parameters, self.recipe.train.max_grad_norm)

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
        self.card.details["dev_loss"] = {"step": self.step, "loss": loss}
        self._record({"step": self.step, "dev_loss": loss})

    # --- parts --------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Tensor]:
        """This process's pieces from the present step on, [T] or `pieces_per_pass` side by side."""
        size, workers = self.pieces_per_pass, self.recipe.train.num_workers
        first = self.step * self.recipe.train.accumulate * (size or 1) + self.accelerator.process_index
        processes = self.accelerator.num_processes
        stream = PieceStream(self.recipe.data, self.lm.tokenizer, self.data_root, first, processes, self._never)
        loader: DataLoader[Tensor] = DataLoader(
            stream,
            batch_size=size,
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            worker_init_fn=quiet_worker,
        )
        return from_workers(loader)

    def _new_card(self, kind: str, **details: Any) -> AdapterCard:
        """The card of what is trained: whose backbone it belongs to, and by which recipe."""
        recipe = self.recipe.as_dict()
        name = recipe["train"]["model"] = model_name(self.recipe.train.model)
        self.card = AdapterCard(
            self.lm.backbone.fingerprint(),
            f"{os.path.basename(name)}-{kind}",
            {"model": name, **details, "recipe": recipe},
        )
        return self.card

    def _note_progress(self) -> None:
        self.card.details.update(step=self.step, tokens=self.tokens, train_s=round(self.seconds, 1))

    def _recipe(self) -> dict[str, Any]:
        return self.recipe.as_dict()

    def _identity(self) -> dict[str, Any]:
        return {
            **self.recipe.decisive(),
            "documents": _sizes(self.data_root, self.recipe.data.path),
            "held_out": _sizes(self.data_root, self.recipe.data.dev_path),
            "backbone": self.card.backbone,
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
