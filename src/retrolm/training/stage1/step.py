"""Forward pass of one training step: frozen dense pass, bookmark stream, the losses of all layers together.

Shape letters: L layers with a loss, K KV heads that choose by themselves (or 1), B sequences, N questions, P text
pages.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...engine.bookmark_stream import BookmarkStates, batch_scores, bookmark_stream, layer_scores
from ...engine.dense_pass import DenseStates, dense_pass
from ...engine.model import RetroLM
from ...engine.page_attention import PageAttention
from ...engine.streaming_states import streaming_states
from ...engine.visible_pass import visible_stream
from ...retriever import PageRetriever
from .agreed import agreed_scores
from .batches import Stage1Batch
from .config import Stage1TrainConfig
from .loss import attention_kl, consensus, info_nce, rival_sum
from .recall import free_pages, layer_hits


@dataclass
class StepResult:
    """What one forward pass gives.

    Attributes:
        loss: mean over layers and samples, to be differentiated.
        spreads_L: standard deviation of the raw scores, mean over samples.
        hits_LN: whether a layer's best free pages hold a question's evidence: 1, 0, or NaN where it doesn't count.
        agreed_N: the same of what the last layers agree on, with the words that a batch comes with.
        num_tokens: of the batch.
    """

    loss: Tensor
    spreads_L: Tensor
    hits_LN: Tensor
    agreed_N: Tensor
    num_tokens: int


@dataclass(frozen=True)
class FrozenPass:
    """What training takes from the backbone.

    Attributes:
        shares_LBP: the text pages' shares of the first questions' true attention, where the loss asks for them.
    """

    states: DenseStates
    shares_LBP: Tensor | None


@dataclass(frozen=True)
class PageScores:
    """Scores of every question in the layers with a loss; K = 1 where heads choose together.

    Attributes:
        own_LKNP: of its own text's pages. all_LKNM: of all texts' pages (M = B * P), where they count as negatives.
    """

    own_LKNP: Tensor
    all_LKNM: Tensor | None = None


class Stage1Step(nn.Module):
    """Holds what is trained; the backbone is kept out of its parameters, so that wrappers see only the retriever.

    Attributes:
        layers: those with a loss of their own.
        log_scales: log of each such layer's score scale, [layers]; trained if `learn_temperature`.
        agreed_log_scale: the same of what layers agree on, one number.
        average: running mean of the retriever over the steps (`ema`), or None. In evaluation mode it is what scores.
    """

    def __init__(self, lm: RetroLM, retriever: PageRetriever, train: Stage1TrainConfig) -> None:
        super().__init__()
        self.retriever = retriever
        backbone = lm.backbone
        self.layers = [n for n in range(train.num_skip_layers, backbone.num_layers) if backbone.retrieves(n)]
        self.log_scales = nn.Parameter(torch.zeros(len(self.layers)), requires_grad=train.learn_temperature)
        agreed_learns = train.learn_temperature and train.agreed_share > 0
        self.agreed_log_scale = nn.Parameter(torch.zeros(1), requires_grad=agreed_learns)
        self.average = copy.deepcopy(retriever).requires_grad_(False) if train.ema else None
        self._train_config = train
        object.__setattr__(self, "_model", lm)

    @property
    def _lm(self) -> RetroLM:
        found: RetroLM = self._model  # type: ignore[assignment]
        return found

    @property
    def kept(self) -> PageRetriever:
        """What training is for: the running mean where there is one, with the trained retriever's card."""
        if self.average is None:
            return self.retriever
        self.average.card = self.retriever.card
        return self.average

    @property
    def scoring(self) -> PageRetriever:
        """What scores at the moment: the trained retriever, or in evaluation mode what is kept of it."""
        return self.retriever if self.training else self.kept

    @property
    def reads_alike(self) -> bool:
        """Whether the backbone's pass is the same whatever the retriever, so that it can be made ahead or shared."""
        return self._train_config.encode == "dense"

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the running mean after step number `step` (from 0); it moves fast at first and so forgets the start."""
        if self.average is not None:
            share = 1 - min(self._train_config.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.average.parameters()), list(self.retriever.parameters()), share)

    def forward(self, batch: Stage1Batch, frozen: FrozenPass | None = None) -> StepResult:
        """Result of a batch; `frozen` is the backbone's pass over it, if it was made already."""
        frozen = self.read(batch) if frozen is None else frozen
        return self.judge(batch, self.scores(batch, frozen), frozen)

    def read(self, batch: Stage1Batch) -> FrozenPass:
        """The backbone's pass over the texts and questions; nothing in it is trained."""
        if self._lm.config.page_marks:
            return FrozenPass(DenseStates(), None)  # tokens see bookmarks: nothing of the pass is known beforehand
        if not self.reads_alike:
            return FrozenPass(streaming_states(self._lm, self.scoring, batch.pages), None)
        backbone, attention = self._lm.backbone, None
        if self._train_config.loss != "info_nce":
            attention = PageAttention(backbone, batch.pages, self.layers)
        states = dense_pass(backbone, self._lm.attachment, batch.pages, attention)
        shares = None if attention is None else torch.stack([attention.shares(layer) for layer in self.layers])
        return FrozenPass(states, shares)

    def scores(self, batch: Stage1Batch, frozen: FrozenPass) -> PageScores:
        """Page scores of every question."""
        states = self._bookmarks(batch, frozen)
        by_head = self._train_config.select_by == "kv_head"
        parts = states, self.layers, batch.pages.num_questions, by_head
        if batch.rival_NM is None:
            return PageScores(layer_scores(*parts)[:, :, batch.sequence_N, batch.query_N])
        all_LKNBP = batch_scores(*parts)[:, :, batch.sequence_N, batch.query_N]
        own = (
            batch.sequence_N[:, None, None].expand(-1, 1, all_LKNBP.shape[-1]).expand(*all_LKNBP.shape[:2], -1, -1, -1)
        )
        return PageScores(all_LKNBP.gather(3, own)[:, :, :, 0], all_LKNBP.flatten(3))

    def _bookmarks(self, batch: Stage1Batch, frozen: FrozenPass) -> BookmarkStates:
        """The bookmarks of a batch, differentiable."""
        lm, retriever = self._lm, self.scoring
        parts = lm.backbone, lm.attachment, retriever, retriever.embedding, batch.pages
        if lm.config.page_marks:
            return visible_stream(*parts, lm.config)
        return bookmark_stream(*parts, frozen.states, lm.config)

    def judge(self, batch: Stage1Batch, scores: PageScores, frozen: FrozenPass) -> StepResult:
        """Loss and figures of page scores."""
        known = scores.own_LKNP.detach()
        there_NP = (batch.pages.text_lengths > 0)[batch.sequence_N]
        spreads_L = _spread(known, there_NP).mean((1, 2))
        loss = self._loss(scores, frozen.shares_LBP, batch)
        agreed_NP = self._agreed(known, batch)
        hits_LN, agreed_N = self._hits(known, batch).mean(1), self._hits(agreed_NP, batch)
        return StepResult(loss, spreads_L, hits_LN, agreed_N, batch.pages.num_tokens)

    def _free(self, batch: Stage1Batch) -> Tensor:
        """The pages that have to be chosen, of each question's text, bool [N, P]."""
        return free_pages(batch.pages, self._train_config.num_local_pages)[batch.sequence_N]

    def _hits(self, scores_NP: Tensor, batch: Stage1Batch) -> Tensor:
        """Whether the best free pages hold the evidence, [..., N] for scores [..., N, P]."""
        *others, num_questions, num_pages = scores_NP.shape
        gold, free = (
            x.expand(*others, num_questions, num_pages).reshape(-1, num_pages)
            for x in (batch.positive_NP, self._free(batch))
        )
        hits = layer_hits(scores_NP.reshape(-1, num_pages), gold, free, self._train_config.recall_pages)
        return hits.view(*others, num_questions)

    def _agreed(self, scores_LKNP: Tensor, batch: Stage1Batch) -> Tensor:
        """What the last layers and the batch's words agree on, [N, P]."""
        train = self._train_config
        return agreed_scores(scores_LKNP[-train.agreed_layers :], batch.words_NP, self._free(batch), train.agreed_words)

    @torch.no_grad()
    def calibrate(self, spreads_L: Tensor) -> None:
        """Scale every layer so that its scores, now spread by `spreads_L`, have a standard deviation of 1."""
        self.log_scales.copy_(-spreads_L.clamp(min=1e-6).log())

    def _loss(self, raw: PageScores, shares_LBP: Tensor | None, batch: Stage1Batch) -> Tensor:
        """Mean over layers and, within each, over texts."""
        train, scales = self._train_config, self.log_scales.exp()[:, None, None, None]
        scores = raw.own_LKNP * scales
        loss = self._contrast(scores, None if raw.all_LKNM is None else raw.all_LKNM * scales, batch)
        if shares_LBP is not None:
            divergence = self._divergence(scores, shares_LBP, batch)
            loss = divergence if train.loss == "attention_kl" else torch.lerp(loss, divergence, train.kl_share)
        if train.teacher_share:
            loss = torch.lerp(loss, self._dissent(scores, batch), train.teacher_share)
        return torch.lerp(loss, self._agreed_loss(raw, batch), train.agreed_share) if train.agreed_share else loss

    def _contrast(self, scores_LKNP: Tensor, all_LKNM: Tensor | None, batch: Stage1Batch) -> Tensor:
        """The contrastive loss, with other texts' pages among the negatives where they count."""
        rivals_LKN = None
        if all_LKNM is not None and batch.rival_NM is not None:
            rivals_LKN = rival_sum(all_LKNM, batch.rival_NM, self._train_config.batch_negatives)
        each_LKN = info_nce(scores_LKNP, batch.positive_NP, batch.negative_NP, rivals_LKN)
        return (each_LKN * batch.share_N).sum(-1).mean()

    def _dissent(self, scores_LKNP: Tensor, batch: Stage1Batch) -> Tensor:
        """How far each layer is from what all of them together make of the pages."""
        there_NP = (batch.pages.text_lengths > 0)[batch.sequence_N]
        each_LKN = attention_kl(scores_LKNP, consensus(scores_LKNP, there_NP), there_NP)
        return (each_LKN * batch.share_N).sum(-1).mean()

    def _agreed_loss(self, raw: PageScores, batch: Stage1Batch) -> Tensor:
        """The contrastive loss of what layers and words agree on, over the pages that have to be chosen."""
        free_NP = self._free(batch)
        agreed_NP = self._agreed(raw.own_LKNP, batch) * self.agreed_log_scale.exp()
        each_N = info_nce(agreed_NP, batch.positive_NP & free_NP, batch.negative_NP & free_NP)
        return (each_N * batch.share_N).sum()

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
