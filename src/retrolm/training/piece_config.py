"""What every recipe says that trains on pieces of documents by language modelling: `[data]`, and most of `[train]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import check_choices
from ..errors import UserError
from .recipe import check_ranges, check_types

# Options that no trained number depends on; a resumed run may change them. The backbone is told by its fingerprint, so
# it may move to another folder.
FREE_OPTIONS = ("model", "log_every", "save_every", "dev_every", "num_workers", "bits")


@dataclass(frozen=True)
class PieceDataConfig:
    """Which documents are read, and how they are cut.

    Attributes:
        path: documents: a file or folder relative to the data root (see `read_documents`); "" = from the hub.
        hub, split: data set on the hub with a column `text`.
        dev_path: held-out documents, relative to the data root; none of them is trained on. "" = no held-out loss.
        max_tokens: tokens of a piece, prefix included; a piece never crosses documents. min_tokens: shorter ends of
            documents are left out.
        prefix: "" = plain text, with BOS where the tokenizer has one (the first page is the sink); "chat" = the chat
            template's head as a page of its own, as when documents are read.
        interleave: documents that pieces are drawn from in turn at random. epochs: how often all are read at most.
        dev_pieces: pieces of held-out loss.
        seed: order of the pieces.
    """

    path: str = ""
    hub: str = ""
    split: str = "train"
    dev_path: str = ""
    max_tokens: int = 12288
    min_tokens: int = 4096
    prefix: Literal["", "chat"] = ""
    interleave: int = 16
    epochs: int = 100
    dev_pieces: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        if bool(self.path) == bool(self.hub):
            raise UserError("The [data] table names either a path or a hub data set.")
        for name in ("max_tokens", "min_tokens", "interleave", "epochs", "dev_pieces"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)!r}.")
        if self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}.")


@dataclass(frozen=True)
class PieceTrainConfig:
    """How it is trained.

    Attributes:
        model: backbone: folder, Hugging Face id or demo name.
        dtype: arithmetic; trained weights are float32 always.
        rank, alpha, targets: of the adapter: rank, scale alpha / rank, "all" linear modules or those of "attention".
        checkpointing: keep only each layer's input and run it again in the backward pass.
        num_steps: optimiser steps. accumulate: forward passes per step, over all processes.
        lr: peak learning rate. weight_decay, beta2, max_grad_norm: AdamW and clipping.
        warmup: share of the steps with rising rate. final_lr: share of the peak at the end (cosine in between).
        loss_chunk: tokens whose logits exist at once.
        deterministic: ask PyTorch for kernels that repeat bit for bit on a GPU too, at some cost in speed.
        seed: initial adapter.
        log_every, save_every, dev_every: steps between log lines, checkpoints and held-out losses (0 = never).
        num_workers: 1 = a process of its own reads and tokenises, 0 = none.
        bits: 16 = the adapter in PEFT's format, 8 = half its size, in our own; 32 = as trained.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    rank: int = 8
    alpha: float = 16.0
    targets: Literal["all", "attention"] = "all"
    checkpointing: bool = True
    num_steps: int = 200
    accumulate: int = 4
    lr: float = 1e-4
    weight_decay: float = 0.01
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    warmup: float = 0.03
    final_lr: float = 0.05
    loss_chunk: int = 2048
    deterministic: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 50
    dev_every: int = 0
    num_workers: int = 1
    bits: int = 16

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        check_ranges(
            self,
            at_least_one=("rank", "num_steps", "accumulate", "loss_chunk", "log_every"),
            not_negative=("save_every", "dev_every", "weight_decay"),
            inside_unit=("lr", "beta2"),
            shares=("warmup", "final_lr"),
            positive=("alpha", "max_grad_norm"),
        )
        if self.num_workers not in (0, 1):
            raise UserError(f"num_workers must be 0 or 1, got {self.num_workers}: documents are read in one order.")
        if self.bits not in (8, 16, 32):
            raise UserError(f"bits={self.bits} is not a choice. Allowed: 8, 16, 32.")
