"""What is trained, and the loss of pieces side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...engine.adapter import AdapterCard
from ...engine.landmark_loss import LandmarkPass, landmark_losses
from ...engine.landmarks import new_landmarks
from ...engine.loading import freeze
from ...engine.model import RetroLM
from ..piece_step import PieceStep
from .config import LandmarkTrainConfig


class LandmarkStep(PieceStep):
    """The landmarks' embedding and an adapter, at work on a frozen backbone.

    Args:
        lm: the backbone. num_prefix: leading tokens of each piece that are not to be predicted.
    """

    def __init__(self, lm: RetroLM, train: LandmarkTrainConfig, num_prefix: int, card: AdapterCard) -> None:
        super().__init__()
        object.__setattr__(self, "_lm", lm)
        self._train_config, self._first = train, max(num_prefix, 1)
        freeze(lm.model)
        # The end-of-sequence row: on held-out pieces it starts 0.3 lower in loss than the vocabulary's mean.
        start_E = lm.untrained_bookmark()
        self.landmarks = new_landmarks(lm.backbone, start_E, train.targets, train.rank, train.alpha, card)
        lm.use_adapter(self.landmarks.adapter)

    def program(self, num_tokens: int, causal: bool | None = None) -> LandmarkPass:
        return LandmarkPass(self._train_config.num_between)

    def running(self, program: LandmarkPass) -> AbstractContextManager[None]:
        running: AbstractContextManager[None] = self.lm.attachment.run(program)
        return running

    def forward(self, pieces: Tensor, program: LandmarkPass) -> Tensor:
        train = self._train_config
        landmark, rows = self.landmarks.embedding, torch.atleast_2d(pieces)
        return landmark_losses(self.lm.backbone, rows, landmark, train.num_between, self._first, train.loss_chunk).sum()

    def num_losses(self, pieces: Tensor) -> int:
        return pieces.numel() // pieces.shape[-1] * (pieces.shape[-1] - self._first)

    @property
    def lm(self) -> RetroLM:
        found: RetroLM = self._lm  # type: ignore[assignment]
        return found
