"""Recall tables from page scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.model import RetroLM
from ...metrics.page_recall import page_hits
from ...retriever import PageRetriever
from ..statistics import score_interval
from .cases import RetrievalCase
from .scores import score_pages, scoring_layers

NUM_PAGES = (8, 14)


def recall_rows(
    lm: RetroLM,
    cases: Iterable[RetrievalCase],
    retrievers: Mapping[str, PageRetriever],
    indexes: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Recall of every index over `cases`.

    Returns:
        One row per index and number of pages: {"index", "num_pages", "recall" (mean over the layers that score),
        "best_layer", "best_recall", "layers" (recall per layer), "scoring_layers", "num_samples"}, and 95% intervals
        over questions as "recall_ci" (bootstrap) and "best_recall_ci" (of the layer found best). The pages compete
        without the last text page, which is always attended; any gold page counts.
    """
    hits: dict[tuple[str, int], list[Tensor]] = {}
    count = 0
    for count, case in enumerate(cases, start=1):
        for name, scores in score_pages(lm, case.batch, retrievers, indexes).items():
            for num_pages in NUM_PAGES:
                hits.setdefault((name, num_pages), []).append(case_hits(scores, case, num_pages))
        if progress is not None:
            progress(count)
    return [_row(lm, name, pages, torch.stack(found).float()) for (name, pages), found in hits.items()]


def case_hits(scores_LP: Tensor, case: RetrievalCase, num_pages: int) -> Tensor:
    """Whether each layer's `num_pages` best pages include a gold page, bool [L]."""
    gold = torch.zeros(case.num_pages, dtype=torch.bool)
    gold[list(case.gold)] = True
    allowed = torch.arange(case.num_pages) < case.num_pages - 1
    layers = len(scores_LP)
    return page_hits(scores_LP, gold.expand(layers, -1), allowed.expand(layers, -1), num_pages)


def _row(lm: RetroLM, name: str, num_pages: int, hits_NL: Tensor) -> dict[str, Any]:
    scoring = scoring_layers(lm)
    by_layer = hits_NL.mean(0)
    chosen = by_layer[scoring]
    best = scoring[int(chosen.argmax())]
    return {
        "index": name,
        "num_pages": num_pages,
        "recall": round(float(chosen.mean()), 4),
        "recall_ci": _interval(hits_NL[:, scoring].mean(1)),
        "best_layer": best,
        "best_recall": round(float(chosen.max()), 4),
        "best_recall_ci": _interval(hits_NL[:, best]),
        "scoring_layers": scoring,
        "layers": [round(float(x), 4) for x in by_layer],
        "num_samples": len(hits_NL),
    }


def _interval(values_N: Tensor) -> list[float]:
    low, high = score_interval([round(float(value), 6) for value in values_N])
    return [round(low, 4), round(high, 4)]
