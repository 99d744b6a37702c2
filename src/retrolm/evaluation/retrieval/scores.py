"""Scores of all text pages for the question, by every index, from one dense pass.

Shape letters: T tokens, P text pages, W page width, H, K heads, D head dim, Q question tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...engine.bookmark_stream import bookmark_stream, page_scores
from ...engine.dense_pass import dense_pass
from ...engine.model import RetroLM
from ...engine.page_attention import PageAttention
from ...engine.page_batch import PageBatch
from ...methods import METHODS, PageTensors
from ...retriever import PageRetriever

TRAINING_FREE = ("mean_key", "quest_pages", "random", "recency")
ORACLE = "attention_mass"
UNTRAINED = "untrained_bookmarks"


@torch.no_grad()
def score_pages(lm: RetroLM, batch: PageBatch, retrievers: Mapping[str, PageRetriever]) -> dict[str, Tensor]:
    """Score every text page of one sequence with every index.

    Args:
        batch: one sequence (B = 1). retrievers: trained retrievers by name.

    Returns:
        float32 [L, P] by index name: the retrievers, untrained bookmarks, `TRAINING_FREE`, and the question's true
        attention mass on each page, mean over heads and question tokens (the oracle).
    """
    batch = batch.to(lm.device)
    found: dict[str, list[Tensor]] = {name: [] for name in TRAINING_FREE}
    attention = PageAttention(lm.backbone, batch, range(lm.backbone.num_layers))

    def observe(layer: int, q_BTHD: Tensor, k_BTKD: Tensor) -> None:
        for name in TRAINING_FREE:
            found[name].append(_index_scores(name, layer, batch, q_BTHD[0], k_BTKD[0]))
        attention(layer, q_BTHD, k_BTKD)

    dense = dense_pass(lm.backbone, lm.attachment, batch, observe)
    scores = {name: torch.stack(rows) for name, rows in found.items()}
    scores[ORACLE] = torch.stack([attention.mass[layer][0] for layer in range(lm.backbone.num_layers)])
    for name, retriever in {UNTRAINED: None, **retrievers}.items():
        bookmark = lm.untrained_bookmark() if retriever is None else retriever.embedding
        states = bookmark_stream(lm.backbone, lm.attachment, retriever, bookmark, batch, dense)
        scores[name] = torch.stack([page_scores(states, layer)[0, 0] for layer in range(lm.backbone.num_layers)])
    return {name: value.float().cpu() for name, value in scores.items()}


def _index_scores(name: str, layer: int, batch: PageBatch, q_THD: Tensor, k_TKD: Tensor) -> Tensor:
    """Scores [P] of a training-free page index."""
    method = METHODS.get(name)()
    starts, lengths = batch.starts_BM[0], batch.lengths_BM[0]
    pages = _page_tensors(layer, q_THD, k_TKD, starts[:-1], lengths[:-1], first=0)
    question = _page_tensors(layer, q_THD, k_TKD, starts[-1:], lengths[-1:], first=len(starts) - 1)
    return method.score(method.probe(question), method.digest(pages))[0].float()


def _page_tensors(layer: int, q_THD: Tensor, k_TKD: Tensor, starts: Tensor, lengths: Tensor, first: int) -> PageTensors:
    rows = starts[:, None] + torch.arange(int(lengths.max()), device=starts.device)
    rows = rows.clamp(max=len(q_THD) - 1)
    ordinals = first + torch.arange(len(starts), device=starts.device)
    return PageTensors(layer, q_THD[rows], k_TKD[rows], lengths, ordinals)
