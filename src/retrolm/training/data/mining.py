"""Hard negatives: passages that look like the answer and aren't, by BM25 or by an embedder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bm25_library import load_bm25s
from ...errors import UserError

_MIN_ANSWER_CHARS = 4
_SPARE_HITS = 16


Embed = Callable[[Sequence[str]], NDArray[np.floating[Any]]]


class Miner(ABC):
    """Ranks passages for a query and picks hard negatives from the top.

    Args:
        texts: passages, by index. Raises `UserError` if there are none.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        if not texts:
            raise UserError("There are no passages to mine hard negatives from.")
        self._texts = texts

    @abstractmethod
    def ranked(self, queries: Sequence[str], count: int) -> list[list[int]]:
        """Return, per query, the indices of up to `count` passages, best first."""

    def mine(
        self, queries: Sequence[str], excluded: Sequence[set[int]], answers: Sequence[Sequence[str]], count: int
    ) -> list[list[int]]:
        """Return, per query, up to `count` best-ranked passages outside `excluded` without an answer string.

        Answers of fewer than 4 characters are not looked for: they occur by chance.
        """
        ranked = self.ranked(queries, min(len(self._texts), count + _SPARE_HITS))
        return [self._picked(ranked[i], excluded[i], answers[i])[:count] for i in range(len(queries))]

    def _picked(self, ranked: Sequence[int], excluded: set[int], answers: Sequence[str]) -> list[int]:
        wanted = [answer.lower() for answer in answers if len(answer) >= _MIN_ANSWER_CHARS]
        return [i for i in ranked if i not in excluded and not contains_any(self._texts[i], wanted)]


class BM25Miner(Miner):
    """Ranks by BM25 (k1 = 0.9, b = 0.4). Raises `UserError` if bm25s is not installed."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__(texts)
        self._bm25s = bm25s = load_bm25s("Mining hard negatives", "training")
        self._index = bm25s.BM25(k1=0.9, b=0.4)
        self._index.index(bm25s.tokenize(list(texts), stopwords="en", show_progress=False), show_progress=False)

    def ranked(self, queries: Sequence[str], count: int) -> list[list[int]]:
        """Return the passages that share a word with each query, best first."""
        tokens = self._bm25s.tokenize(list(queries), stopwords="en", show_progress=False)
        indices, scores = self._index.retrieve(tokens, k=count, show_progress=False, backend_selection="numpy")
        return [row[score > 0].tolist() for row, score in zip(indices, scores, strict=True)]


class EmbeddingMiner(Miner):
    """Ranks by the inner product of embeddings.

    Args:
        embed: texts -> array [num_texts, dim], normalised if cosine is meant.
    """

    def __init__(self, texts: Sequence[str], embed: Embed) -> None:
        super().__init__(texts)
        self._embed = embed
        self._vectors_PD = embed(texts)

    def ranked(self, queries: Sequence[str], count: int) -> list[list[int]]:
        """Return the passages with the largest inner products, ties by index."""
        scores_QP = self._embed(queries) @ self._vectors_PD.T
        order: list[list[int]] = np.argsort(-scores_QP, axis=1, kind="stable")[:, :count].tolist()
        return order


def contains_any(text: str, lowered: Sequence[str]) -> bool:
    """Whether a text contains one of some lower-case strings, whatever its case."""
    lower = text.lower()
    return any(part in lower for part in lowered)
