"""Recall during training: is the evidence among the best pages besides those that are always attended?"""

from __future__ import annotations

import torch
from torch import Tensor

from ...engine.page_batch import PageBatch
from ...metrics.page_recall import page_hits

NUM_PAGES = 8
MAX_GOLD_PAGES = 4


def free_pages(pages: PageBatch, num_local: int = 1) -> Tensor:
    """Text pages that have to be chosen, bool [B, P]: neither the last `num_local` nor, without a prefix, the first."""
    lengths = pages.text_lengths
    places = torch.arange(lengths.shape[1], device=lengths.device)
    free = places < (lengths > 0).sum(1, keepdim=True) - num_local
    return free if pages.num_prefix else free & (places > 0)


def layer_hits(scores_NP: Tensor, gold_NP: Tensor, free_NP: Tensor, num_pages: int = NUM_PAGES) -> Tensor:
    """1 where a gold page is among the `num_pages` best free pages, else 0, float32 [N], one row per question.

    NaN where it doesn't count: no gold page, one in a page that is attended anyway, or more than 4 of them.
    """
    num_gold = gold_NP.sum(1)
    counts = (num_gold > 0) & (num_gold <= MAX_GOLD_PAGES) & ~(gold_NP & ~free_NP).any(1)
    hits = page_hits(scores_NP, gold_NP, free_NP, num_pages).float()
    return hits.masked_fill(~counts, torch.nan)
