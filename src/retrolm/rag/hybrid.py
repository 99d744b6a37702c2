"""BM25 and embeddings together, by reciprocal rank fusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..methods.base import METHODS
from ..methods.knobs import positive
from .bm25 import bm25_scores
from .chunks import best_first
from .dense import DenseKnobs, dense_scores
from .method import RagMethod


@dataclass(frozen=True)
class HybridKnobs(DenseKnobs):
    """Further settings.

    Attributes:
        fusion_constant: added to each rank before its reciprocal is taken; the larger, the less first ranks count.
    """

    fusion_constant: int = 60


@METHODS.register("rag_hybrid")
class RagHybrid(RagMethod):
    """A chunk's score is the sum of 1 / (constant + rank) over both rankings."""

    name = "rag_hybrid"
    paper = "https://arxiv.org/abs/2210.11934"
    summary = "prompt of the chunks that BM25 and embeddings rank best together"
    trained = "a sentence embedder, by others"
    index = "words and embedding"
    query = "the question's words and embedding"
    Knobs = HybridKnobs
    knobs: HybridKnobs

    def check_knobs(self) -> None:
        super().check_knobs()
        positive(self.name, self.knobs, "fusion_constant")

    def scores(self, query: str, chunks: Sequence[str], device: Any = None) -> list[float]:
        rankings = [bm25_scores(query, chunks), dense_scores(self.knobs.embedder, query, chunks, device)]
        return fused(rankings, self.knobs.fusion_constant)


def fused(rankings: Sequence[Sequence[float]], constant: int) -> list[float]:
    """Reciprocal rank fusion of several lists of scores; ranks count from 1."""
    total = [0.0] * len(rankings[0])
    for scores in rankings:
        for rank, index in enumerate(best_first(scores), start=1):
            total[index] += 1 / (constant + rank)
    return total
