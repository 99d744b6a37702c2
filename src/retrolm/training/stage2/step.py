"""What is trained, and the loss of one piece."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ...engine.adapter import AdapterCard, LoraAdapter, new_adapter
from ...engine.frozen_projections import FrozenProjections
from ...engine.loading import freeze
from ...engine.model import RetroLM
from ...engine.page_pulls import retriever_gradients
from ...engine.sparse_pass import SparseProgram
from ...engine.text_loss import sparse_program, token_losses
from ...retriever import PageRetriever
from ..piece_step import PieceStep
from .config import Stage2TrainConfig


class Stage2Step(PieceStep):
    """Holds what is trained: an adapter, or the model itself.

    Args:
        lm: backbone and retriever. num_prefix: leading tokens of each piece with a page of their own.

    Attributes:
        adapter: the adapter, at work on the backbone, or None if all weights are trained.
        frozen: what bookmark rows go through then.
    """

    def __init__(self, lm: RetroLM, train: Stage2TrainConfig, num_prefix: int, card: AdapterCard) -> None:
        super().__init__()
        object.__setattr__(self, "_lm", lm)
        self._train_config, self._num_prefix = train, num_prefix
        embedding = lm.untrained_bookmark() if lm.retriever is None else lm.retriever.embedding.detach()
        # A retriever that is being trained lends its embedding, which moves.
        embedding = embedding if train.train_retriever else embedding.clone().float()
        self.register_buffer("bookmark", embedding, persistent=False)
        self.adapter: LoraAdapter | None = None
        self.frozen: FrozenProjections | None = None
        if train.weights == "full":
            lm.model.requires_grad_(True)
            self.frozen = FrozenProjections(lm.backbone)
            self.model = lm.model
        else:
            freeze(lm.model)
            self.adapter = new_adapter(lm.backbone, train.targets, train.rank, train.alpha, card).place(lm.backbone)
            lm.use_adapter(self.adapter)

    def program(self, num_tokens: int, causal: bool | None = None) -> SparseProgram | None:
        """The program of a piece, or None for full attention.

        Args:
            causal: choose pages without knowledge of their tokens; None = as the recipe says.
        """
        train = self._train_config
        if train.attention == "full":
            return None
        config = train.engine_config()
        config = config if causal is None else config.replace(causal_selection=causal)
        return sparse_program(
            self.lm,
            config,
            num_tokens,
            self._num_prefix,
            detach_pages=train.detach_pages,
            frozen=self.frozen,
            train_retriever=train.train_retriever and torch.is_grad_enabled(),
        )

    def running(self, program: SparseProgram | None) -> AbstractContextManager[None]:
        """The block in which a piece's forward and backward pass belong."""
        return nullcontext() if program is None else self.lm.attachment.run(program)

    def forward(self, piece_T: Tensor, program: SparseProgram | None) -> Tensor:
        """Sum of the losses of a piece's tokens; their number is `num_losses(piece)`."""
        half = self._train_config.dtype == "bfloat16" and self._train_config.weights == "full"
        with torch.autocast(self.lm.device.type, torch.bfloat16, enabled=half):
            chunk = self._train_config.loss_chunk
            losses = token_losses(self.lm.backbone, piece_T, program, self.bookmark, self._num_prefix, chunk)  # type: ignore[arg-type]
        return losses.sum()

    @property
    def apart(self) -> PageRetriever | None:
        """The retriever, if it is being trained."""
        return self.lm.retriever if self._train_config.train_retriever else None

    @property
    def apart_lr(self) -> float:
        return self._train_config.retriever_lr

    def after_backward(self, program: SparseProgram | None) -> None:
        if program is None or program.pulls is None or self.apart is None:
            return
        for value, gradient in zip(self.apart.parameters(), retriever_gradients(self.lm, program), strict=True):
            value.grad = gradient if value.grad is None else value.grad + gradient

    def num_losses(self, piece_T: Tensor) -> int:
        """Tokens of a piece that are predicted: all but the prefix, or the first."""
        return len(piece_T) - max(self._num_prefix, 1)

    @property
    def lm(self) -> RetroLM:
        found: RetroLM = self._lm  # type: ignore[assignment]
        return found


def retriever_digest(lm: RetroLM) -> str | None:
    """Short hash of the retriever's weights, or None without one."""
    if lm.retriever is None:
        return None
    digest = hashlib.sha256()
    for value in lm.retriever.state_dict().values():
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
