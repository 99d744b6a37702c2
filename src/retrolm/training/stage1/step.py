"""Forward pass of one training step: frozen dense pass, bookmark stream, one loss per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...engine.bookmark_stream import bookmark_stream, page_scores
from ...engine.dense_pass import dense_pass
from ...engine.model import RetroLM
from ...metrics.page_recall import page_hits
from ...retriever import PageRetriever
from .batches import Stage1Batch
from .loss import info_nce


@dataclass
class StepResult:
    """Loss (mean over layers and samples), and per layer: loss, recall in 8 pages, spread of the raw scores."""

    loss: Tensor
    layer_losses: Tensor
    layer_recalls: Tensor
    layer_spreads: Tensor


class Stage1Step(nn.Module):
    """Holds what is trained; the backbone is kept out of its parameters, so that wrappers see only the retriever.

    Attributes:
        log_scales: log of each scored layer's score scale, [layers]; trained if `learn_temperature`.
    """

    def __init__(self, lm: RetroLM, retriever: PageRetriever, num_skip_layers: int, learn_temperature: bool) -> None:
        super().__init__()
        self.retriever = retriever
        self.layers = [
            layer for layer in range(lm.backbone.num_layers) if layer >= num_skip_layers and lm.backbone.retrieves(layer)
        ]
        self.log_scales = nn.Parameter(torch.zeros(len(self.layers)), requires_grad=learn_temperature)
        object.__setattr__(self, "_lm", lm)

    def forward(self, batch: Stage1Batch) -> StepResult:
        lm: RetroLM = self._lm  # type: ignore[assignment]
        dense = dense_pass(lm.backbone, lm.attachment, batch.pages)
        states = bookmark_stream(
            lm.backbone, lm.attachment, self.retriever, self.retriever.embedding, batch.pages, dense
        )
        competing = batch.pages.lengths_BM[:, :-1] > 0
        losses, recalls, spreads = [], [], []
        for index, layer in enumerate(self.layers):
            raw = page_scores(states, layer)
            scores = raw * self.log_scales[index].exp()
            losses.append(info_nce(scores, batch.positive_BP, batch.negative_BP).mean())
            recalls.append(page_hits(raw.detach(), batch.positive_BP, competing, 8).float().mean())
            spreads.append(_spread(raw.detach(), competing))
        layer_losses = torch.stack(losses)
        return StepResult(layer_losses.mean(), layer_losses.detach(), torch.stack(recalls), torch.stack(spreads))

    @torch.no_grad()
    def calibrate(self, spreads: Tensor) -> None:
        """Scale every layer so that its scores, now spread by `spreads` [layers], have a standard deviation of 1."""
        self.log_scales.copy_(-spreads.clamp(min=1e-6).log())


def _spread(scores_BP: Tensor, competing_BP: Tensor) -> Tensor:
    """Standard deviation of the scores inside a sample, mean over samples."""
    count = competing_BP.sum(1, keepdim=True)
    mean = (scores_BP * competing_BP).sum(1, keepdim=True) / count
    square = ((scores_BP - mean) ** 2 * competing_BP).sum(1) / count[:, 0]
    return square.sqrt().mean()
