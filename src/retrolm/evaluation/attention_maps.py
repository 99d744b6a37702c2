"""Maps of layer by position: full attention of the question beside the page scores of retrievers (Figures 2 to 4).

Shape letters: L layers, P text pages, S strips of the text, a few tokens wide each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.dense_pass import dense_pass
from ..engine.model import RetroLM
from ..engine.page_attention import PageAttention
from ..engine.page_batch import PageBatch
from ..retriever import PageRetriever
from .readers import sample_format
from .retrieval.cases import RetrievalCase, retrieval_case
from .retrieval.scores import ORACLE, UNTRAINED, score_pages, scoring_layers
from .tasks.sample import EvalSample

STRIP_TOKENS = 16


@dataclass(frozen=True)
class AttentionMap:
    """What one question looks at in its text.

    Attributes:
        num_tokens: of the text. spans: token ranges of the evidence. gold: pages that hold it.
        attention_LS: share of the question's full attention on each strip of `strip_tokens` tokens, mean over heads
            and question tokens; what falls outside of the text (prefix, question) is left out.
        mass_LP: the same by page. scores: page scores by retriever, each [L, P]; NaN in layers that don't score.
    """

    sample: EvalSample
    page_size: int
    strip_tokens: int
    num_tokens: int
    spans: tuple[tuple[int, int], ...]
    gold: frozenset[int]
    attention_LS: Tensor
    mass_LP: Tensor
    scores: dict[str, Tensor]


def attention_map(
    lm: RetroLM, sample: EvalSample, retrievers: Mapping[str, PageRetriever], strip_tokens: int = STRIP_TOKENS
) -> AttentionMap:
    """Measure one sample on dense passes; without retrievers untrained bookmarks stand beside full attention."""
    lm.format = sample_format(lm, sample)
    case = retrieval_case(lm, sample)
    found = score_pages(lm, case.batch, retrievers)
    shown = list(retrievers) or [UNTRAINED]
    return AttentionMap(
        sample,
        lm.config.page_size,
        strip_tokens,
        int(case.batch.text_lengths.sum()),
        case.spans,
        case.gold,
        _strip_attention(lm, case, strip_tokens),
        found[ORACLE],
        {name: _scoring_only(lm, found[name]) for name in shown},
    )


def gold_ranks(scores_LP: Tensor, gold: frozenset[int]) -> list[int | None]:
    """In each layer, the rank of the best page that holds evidence; 1 = first, None where there are no scores.

    `gold` must not be empty.
    """
    best_L1 = scores_LP[:, sorted(gold)].amax(1, keepdim=True)
    ranks = (scores_LP > best_L1).sum(1) + 1
    return [None if bool(best.isnan()) else int(rank) for rank, best in zip(ranks, best_L1[:, 0], strict=True)]


def _scoring_only(lm: RetroLM, scores_LP: Tensor) -> Tensor:
    blank = torch.full_like(scores_LP, torch.nan)
    layers = scoring_layers(lm)
    blank[layers] = scores_LP[layers]
    return blank


def strips(batch: PageBatch, strip_tokens: int) -> PageBatch:
    """The same one sequence, its text cut into strips instead of pages."""
    num_tokens = int(batch.text_lengths.sum())
    first = torch.arange(0, num_tokens, strip_tokens)
    starts = torch.cat([batch.num_prefix + first, batch.starts_BM[0, -1:]])
    lengths = torch.cat([(num_tokens - first).clamp(max=strip_tokens), batch.lengths_BM[0, -1:]])
    return PageBatch(batch.tokens_BT, batch.num_prefix, starts[None], lengths[None])


def _strip_attention(lm: RetroLM, case: RetrievalCase, strip_tokens: int) -> Tensor:
    batch = strips(case.batch, strip_tokens).to(lm.device)
    layers = range(lm.backbone.num_layers)
    attention = PageAttention(lm.backbone, batch, layers)
    dense_pass(lm.backbone, lm.attachment, batch, attention)
    return torch.stack([attention.mass[layer][0] for layer in layers]).float().cpu()
