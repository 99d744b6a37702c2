"""BM25 over lower-case words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bm25_library import load_bm25s
from ..methods.base import METHODS
from ..word_index import words
from .method import RagMethod


@METHODS.register("rag_bm25")
class RagBM25(RagMethod):
    """Lucene's BM25 (k1 = 1.5, b = 0.75) by bm25s; words, not characters as in LongBench's own script."""

    name = "rag_bm25"
    paper = "https://arxiv.org/abs/2407.03618"
    summary = "prompt of the chunks that BM25 ranks best"
    index = "words"
    query = "the question's words"

    def scores(self, query: str, chunks: Sequence[str], device: Any = None) -> list[float]:
        return bm25_scores(query, chunks)


def bm25_scores(query: str, chunks: Sequence[str]) -> list[float]:
    """BM25 score of each chunk; 0 where they share no word. Raises `UserError` if bm25s is not installed."""
    bm25s = load_bm25s("RAG by BM25", "rag")
    corpus = [words(chunk) for chunk in chunks]
    known = {word for row in corpus for word in row}
    asked = [word for word in words(query) if word in known]
    if not asked:
        return [0.0] * len(chunks)
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(corpus, show_progress=False)
    return [float(score) for score in index.get_scores(asked)]
