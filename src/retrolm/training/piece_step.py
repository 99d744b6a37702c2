"""What is trained on pieces of documents, and its optimiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .piece_config import PieceTrainConfig


class PieceStep(nn.Module, ABC):
    """Holds what is trained, and gives the loss of pieces: int64 [T], or [B, T] side by side."""

    @abstractmethod
    def program(self, num_tokens: int, causal: bool | None = None) -> Any:
        """What decides attention over pieces of so many tokens; `causal`: without knowledge of later tokens."""

    @abstractmethod
    def running(self, program: Any) -> AbstractContextManager[None]:
        """The block in which a forward and its backward pass belong."""

    @abstractmethod
    def forward(self, pieces: Tensor, program: Any) -> Tensor:
        """Sum of the losses of the pieces' tokens."""

    @abstractmethod
    def num_losses(self, pieces: Tensor) -> int:
        """Tokens that are predicted."""

    @property
    def apart(self) -> nn.Module | None:
        """A module that is trained too, but gets its gradients from `after_backward`.

        It is no submodule: wrappers for several processes wait for all gradients in the backward pass.
        """
        return None

    @property
    def apart_lr(self) -> float:
        """Its peak learning rate."""
        return 0.0

    def after_backward(self, program: Any) -> None:
        """What follows the backward pass of pieces under `program`."""


def new_optimizer(step: PieceStep, train: PieceTrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained, on its device; matrices decay, vectors and what is trained apart don't.

    A group's "share", where it has one, is its learning rate in relation to `train.lr`.
    """
    trained = [p for p in step.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if step.apart is not None:
        share = step.apart_lr / train.lr
        groups.append({"params": list(step.apart.parameters()), "weight_decay": 0.0, "share": share})
    on_gpu = trained[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, train.beta2), fused=on_gpu or None)
