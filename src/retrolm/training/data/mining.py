"""Hard negatives by BM25: passages that look like the answer and aren't."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UserError

_MIN_ANSWER_CHARS = 4
_SPARE_HITS = 16


class BM25Miner:
    """A BM25 index over passages (k1 = 0.9, b = 0.4).

    Args:
        texts: passages, by index. Raises `UserError` if bm25s is not installed or there are no texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise UserError("Mining hard negatives needs bm25s: pip install 'retrolm[training]'.") from error
        if not texts:
            raise UserError("There are no passages to mine hard negatives from.")
        self._bm25s = bm25s
        self._texts = texts
        self._index = bm25s.BM25(k1=0.9, b=0.4)
        self._index.index(bm25s.tokenize(list(texts), stopwords="en", show_progress=False), show_progress=False)

    def mine(
        self, queries: Sequence[str], excluded: Sequence[set[int]], answers: Sequence[Sequence[str]], count: int
    ) -> list[list[int]]:
        """Return, per query, up to `count` best-ranked passages outside `excluded` without an answer string.

        Answers of fewer than 4 characters are not looked for: they occur by chance.
        """
        hits = min(len(self._texts), count + _SPARE_HITS)
        tokens = self._bm25s.tokenize(list(queries), stopwords="en", show_progress=False)
        ranked, scores = self._index.retrieve(tokens, k=hits, show_progress=False)
        return [
            self._pick(ranked[i].tolist(), scores[i].tolist(), excluded[i], answers[i], count)
            for i in range(len(queries))
        ]

    def _pick(
        self, ranked: list[int], scores: list[float], excluded: set[int], answers: Sequence[str], count: int
    ) -> list[int]:
        wanted = [answer.lower() for answer in answers if len(answer) >= _MIN_ANSWER_CHARS]
        picked = [
            index
            for index, score in zip(ranked, scores, strict=True)
            if score > 0 and index not in excluded and not contains_any(self._texts[index], wanted)
        ]
        return picked[:count]


def contains_any(text: str, lowered: Sequence[str]) -> bool:
    """Whether a text contains one of some lower-case strings, whatever its case."""
    lower = text.lower()
    return any(part in lower for part in lowered)
