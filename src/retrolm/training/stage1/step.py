"""Forward pass of one training step: frozen dense pass, bookmark stream, one loss per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...engine.bookmark_stream import BookmarkStates, bookmark_stream, head_scores
from ...engine.dense_pass import dense_pass
from ...engine.model import RetroLM
from ...engine.page_attention import PageAttention
from ...retriever import PageRetriever
from .batches import Stage1Batch
from .config import Stage1TrainConfig
from .loss import attention_kl, info_nce
from .recall import free_pages, layer_hits


@dataclass
class StepResult:
    """What one forward pass gives.

    Attributes:
        loss: mean over layers and samples, to be differentiated.
        spreads_L: standard deviation of the raw scores, mean over samples.
        hits_LN: whether a layer's best free pages hold a question's evidence: 1, 0, or NaN where it doesn't count.
    """

    loss: Tensor
    spreads_L: Tensor
    hits_LN: Tensor


class Stage1Step(nn.Module):
    """Holds what is trained; the backbone is kept out of its parameters, so that wrappers see only the retriever.

    Attributes:
        layers: those with a loss of their own.
        log_scales: log of each such layer's score scale, [layers]; trained if `learn_temperature`.
    """

    def __init__(self, lm: RetroLM, retriever: PageRetriever, train: Stage1TrainConfig) -> None:
        super().__init__()
        self.retriever = retriever
        backbone = lm.backbone
        self.layers = [n for n in range(train.num_skip_layers, backbone.num_layers) if backbone.retrieves(n)]
        self.log_scales = nn.Parameter(torch.zeros(len(self.layers)), requires_grad=train.learn_temperature)
        self._train_config = train
        object.__setattr__(self, "_lm", lm)

    def forward(self, batch: Stage1Batch) -> StepResult:
        lm: RetroLM = self._lm  # type: ignore[assignment]
        attention = None
        if self._train_config.loss != "info_nce":
            attention = PageAttention(lm.backbone, batch.pages, self.layers)
        dense = dense_pass(lm.backbone, lm.attachment, batch.pages, attention)
        states = bookmark_stream(
            lm.backbone, lm.attachment, self.retriever, self.retriever.embedding, batch.pages, dense, lm.config
        )
        raw = [self._scores(states, layer, batch) for layer in self.layers]
        losses = [self._loss(index, scores, batch, attention) for index, heads in enumerate(raw) for scores in heads]
        known = [heads.detach() for heads in raw]
        there = (batch.pages.text_lengths > 0)[batch.sequence_N]
        return StepResult(
            torch.stack(losses).mean(),
            torch.stack([torch.stack([_spread(scores, there) for scores in heads]).mean() for heads in known]),
            torch.stack([self._hits(heads, batch) for heads in known]),
        )

    def _scores(self, states: BookmarkStates, layer: int, batch: Stage1Batch) -> Tensor:
        """Page scores of every question: [1, N, P], or one set per KV head [K, N, P]."""
        places = batch.sequence_N, batch.query_N
        heads_KBQP = head_scores(states, layer, batch.pages.num_questions)
        if self._train_config.select_by == "layer":
            heads_KBQP = heads_KBQP.sum(0, keepdim=True)
        return heads_KBQP[:, *places]

    def _hits(self, heads_KNP: Tensor, batch: Stage1Batch) -> Tensor:
        """Whether the best free pages hold the evidence, [N]; a share where KV heads choose by themselves."""
        train = self._train_config
        free = free_pages(batch.pages, train.num_local_pages)[batch.sequence_N]
        hits = [layer_hits(scores, batch.positive_NP, free, train.recall_pages) for scores in heads_KNP]
        return torch.stack(hits).mean(0)

    @torch.no_grad()
    def calibrate(self, spreads_L: Tensor) -> None:
        """Scale every layer so that its scores, now spread by `spreads_L`, have a standard deviation of 1."""
        self.log_scales.copy_(-spreads_L.clamp(min=1e-6).log())

    def _loss(self, index: int, raw_NP: Tensor, batch: Stage1Batch, attention: PageAttention | None) -> Tensor:
        scores_NP = raw_NP * self.log_scales[index].exp()
        kind, share = self._train_config.loss, self._train_config.kl_share
        contrast = (info_nce(scores_NP, batch.positive_NP, batch.negative_NP) * batch.share_N).sum()
        if attention is None:
            return contrast
        first_N = batch.query_N == 0  # true attention is known of each text's own question
        there_BP = batch.pages.text_lengths > 0
        divergence = attention_kl(scores_NP[first_N], attention.shares(self.layers[index]), there_BP).mean()
        return divergence if kind == "attention_kl" else (1 - share) * contrast + share * divergence


def _spread(scores_NP: Tensor, there_NP: Tensor) -> Tensor:
    """Standard deviation of the scores of a question, mean over questions."""
    count = there_NP.sum(1, keepdim=True)
    mean = (scores_NP * there_NP).sum(1, keepdim=True) / count
    square = ((scores_NP - mean) ** 2 * there_NP).sum(1) / count[:, 0]
    return square.sqrt().mean()
