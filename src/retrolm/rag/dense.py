"""Chunks whose embedding is nearest to the question's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..methods.base import METHODS
from .embedder import load_embedder
from .method import RagKnobs, RagMethod


@dataclass(frozen=True)
class DenseKnobs(RagKnobs):
    """Further settings.

    Attributes:
        embedder: minilm, contriever or bge-large; or a catalogue name, a folder, or any sentence-transformers id.
    """

    embedder: str = "minilm"


@METHODS.register("rag_dense")
class RagDense(RagMethod):
    """Inner product of a sentence embedder's vectors."""

    name = "rag_dense"
    paper = "https://arxiv.org/abs/2112.09118"
    summary = "prompt of the chunks whose embedding is nearest to the question's"
    trained = "a sentence embedder, by others"
    index = "embedding"
    query = "the question's embedding"
    Knobs = DenseKnobs
    knobs: DenseKnobs

    def scores(self, query: str, chunks: Sequence[str], device: Any = None) -> list[float]:
        return dense_scores(self.knobs.embedder, query, chunks, device)


def dense_scores(embedder: str, query: str, chunks: Sequence[str], device: Any = None) -> list[float]:
    """Inner product of each chunk's vector with the query's. Raises `UserError` if the embedder can't be had."""
    model = load_embedder(embedder, device)
    return [float(score) for score in model.passages(chunks) @ model.queries([query])[0]]
