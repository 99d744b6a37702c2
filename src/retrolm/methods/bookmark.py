"""RetroLM: the bookmark query of the current page against the bookmark keys of past pages (paper eq 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .base import METHODS, PageTensors, sum_groups
from .head_scores import ScoresHeads


@METHODS.register("retrolm")
class BookmarkMethod(ScoresHeads):
    """Score = sum over heads of ⟨q^b_h, k^b_{h // g}⟩ / √(H·D), before RoPE (D3, D4, D5)."""

    name = "retrolm"
    paper = "https://arxiv.org/abs/2502.11444"
    summary = "trained bookmark tokens, one per page; untrained copies without a retriever"
    trained = "bookmark tokens' projections, by contrast"
    index = "key of the page's bookmark"
    query = "query of the current page's bookmark"
    needs_bookmarks = True
    agreement_layers = 8
    word_weight = 1.0
    reads_queries = False

    def digest(self, pages: PageTensors) -> Tensor:
        assert pages.bookmark_k_NKD is not None
        return _placed(pages.bookmark_k_NKD, pages).flatten(1)

    def probe(self, pages: PageTensors) -> Tensor:
        assert pages.bookmark_q_NHD is not None
        num_heads, head_dim = pages.bookmark_q_NHD.shape[1:]
        queries = sum_groups(pages.bookmark_q_NHD.to(_wide(pages.bookmark_q_NHD)), pages.k_NWKD.shape[2])
        return _placed(queries, pages).flatten(1) * (num_heads * head_dim) ** -0.5

    def score(self, probe_NF: Tensor, digest_PE: Tensor) -> Tensor:
        return probe_NF @ digest_PE.to(probe_NF.dtype).T


def _placed(rows_NKD: Tensor, pages: PageTensors) -> Tensor:
    """Rotate rows to their page's true place where the literal reading of D3 asks for it."""
    if pages.page_cos is None or pages.page_sin is None:
        return rows_NKD
    return rotate(rows_NKD, pages.page_cos[:, None], pages.page_sin[:, None])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
