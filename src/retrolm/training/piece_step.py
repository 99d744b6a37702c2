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


def new_optimizer(step: nn.Module, train: PieceTrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained, on its device; matrices decay, vectors don't."""
    trained = [p for p in step.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    on_gpu = trained[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, train.beta2), fused=on_gpu or None)
