"""Forward pass of one training step: frozen dense pass, bookmark stream, the losses of all layers together.

Shape letters: L layers with a loss, K KV heads that choose by themselves (or 1), B sequences, N questions, P text
pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...engine.bookmark_stream import bookmark_stream, layer_scores
from ...engine.dense_pass import DenseStates, dense_pass
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
        num_tokens: of the batch.
    """

    loss: Tensor
    spreads_L: Tensor
    hits_LN: Tensor
    num_tokens: int


@dataclass(frozen=True)
class FrozenPass:
    """What training takes from the backbone.

    Attributes:
        shares_LBP: the text pages' shares of the first questions' true attention, where the loss asks for them.
    """

    states: DenseStates
    shares_LBP: Tensor | None


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
        object.__setattr__(self, "_model", lm)

    @property
    def _lm(self) -> RetroLM:
        found: RetroLM = self._model  # type: ignore[assignment]
        return found

    def forward(self, batch: Stage1Batch, frozen: FrozenPass | None = None) -> StepResult:
        """Result of a batch; `frozen` is the backbone's pass over it, if it was made already."""
        frozen = self.read(batch) if frozen is None else frozen
        return self.judge(batch, self.scores(batch, frozen), frozen)

    def read(self, batch: Stage1Batch) -> FrozenPass:
        """The backbone's pass over the texts and questions; nothing in it is trained."""
        backbone, attention = self._lm.backbone, None
        if self._train_config.loss != "info_nce":
            attention = PageAttention(backbone, batch.pages, self.layers)
        states = dense_pass(backbone, self._lm.attachment, batch.pages, attention)
        shares = None if attention is None else torch.stack([attention.shares(layer) for layer in self.layers])
        return FrozenPass(states, shares)

    def scores(self, batch: Stage1Batch, frozen: FrozenPass) -> Tensor:
        """Page scores of every question in the layers with a loss, [L, K, N, P], K = 1 where heads choose together."""
        lm, bookmark = self._lm, self.retriever.embedding
        states = bookmark_stream(
            lm.backbone, lm.attachment, self.retriever, bookmark, batch.pages, frozen.states, lm.config
        )
        by_head = self._train_config.select_by == "kv_head"
        heads_LKBQP = layer_scores(states, self.layers, batch.pages.num_questions, by_head)
        return heads_LKBQP[:, :, batch.sequence_N, batch.query_N]

    def judge(self, batch: Stage1Batch, scores_LKNP: Tensor, frozen: FrozenPass) -> StepResult:
        """Loss and figures of page scores."""
        known = scores_LKNP.detach()
        there_NP = (batch.pages.text_lengths > 0)[batch.sequence_N]
        spreads_L = _spread(known, there_NP).mean((1, 2))
        loss = self._loss(scores_LKNP, frozen.shares_LBP, batch)
        return StepResult(loss, spreads_L, self._hits(known, batch), batch.pages.num_tokens)

    def _hits(self, scores_LKNP: Tensor, batch: Stage1Batch) -> Tensor:
        """Whether the best free pages hold the evidence, [L, N]; a share where KV heads choose by themselves."""
        train = self._train_config
        free_NP = free_pages(batch.pages, train.num_local_pages)[batch.sequence_N]
        gold, free = (x.expand_as(scores_LKNP).flatten(0, 2) for x in (batch.positive_NP, free_NP))
        hits = layer_hits(scores_LKNP.flatten(0, 2), gold, free, train.recall_pages)
        return hits.view(scores_LKNP.shape[:3]).mean(1)

    @torch.no_grad()
    def calibrate(self, spreads_L: Tensor) -> None:
        """Scale every layer so that its scores, now spread by `spreads_L`, have a standard deviation of 1."""
        self.log_scales.copy_(-spreads_L.clamp(min=1e-6).log())

    def _loss(self, raw_LKNP: Tensor, shares_LBP: Tensor | None, batch: Stage1Batch) -> Tensor:
        """Mean over layers and, within each, over texts."""
        scores = raw_LKNP * self.log_scales.exp()[:, None, None, None]
        contrast = (info_nce(scores, batch.positive_NP, batch.negative_NP) * batch.share_N).sum(-1).mean()
        if shares_LBP is None:
            return contrast
        share = self._train_config.kl_share
        divergence = self._divergence(scores, shares_LBP, batch)
        return divergence if self._train_config.loss == "attention_kl" else (1 - share) * contrast + share * divergence

    def _divergence(self, scores_LKNP: Tensor, shares_LBP: Tensor, batch: Stage1Batch) -> Tensor:
        """From true attention, which is known of each text's own question."""
        there_BP = batch.pages.text_lengths > 0
        own = scores_LKNP[:, :, batch.query_N == 0]
        return attention_kl(own, shares_LBP[:, None], there_BP).mean()


def _spread(scores_NP: Tensor, there_NP: Tensor) -> Tensor:
    """Standard deviation of the scores of each question, [..., N]."""
    count = there_NP.sum(-1)
    mean = (scores_NP * there_NP).sum(-1, keepdim=True) / count[:, None]
    return (((scores_NP - mean) ** 2 * there_NP).sum(-1) / count).sqrt()
