"""Two ROUGE variants that are easily mixed up.

`rouge_l` is LongBench's: the package `rouge` 1.0.1, whose union-LCS counts every word once. `rouge_lsum` is
InfiniteBench's: summary-level ROUGE-L as Google's `rouge-score` computes it (newlines end sentences, no stemming).
They give different numbers for the same pair of texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ..errors import UserError

_NOT_WORD = re.compile(r"[^a-z0-9]+")


def rouge_l(prediction: str, reference: str) -> float:
    """F of `rouge` 1.0.1's "rouge-l"; 0 where the package fails, as on a text without words (the official rule).

    Raises `UserError` if the package isn't installed.
    """
    try:
        from rouge import Rouge
    except ImportError as error:
        raise UserError("ROUGE-L needs the package rouge 1.0.1: pip install 'retrolm[evaluation]'.") from error
    try:
        return float(Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError, ZeroDivisionError):
        return 0.0


def rouge_lsum(prediction: str, references: Iterable[str]) -> float:
    """Best summary-level ROUGE-L F of the prediction against any reference; in [0, 1]."""
    candidate = _sentences(prediction)
    return max((_summary_f(_sentences(reference), candidate) for reference in references), default=0.0)


def _sentences(text: str) -> list[list[str]]:
    return [_NOT_WORD.sub(" ", line.lower()).split() for line in text.split("\n") if line]


def _summary_f(reference: list[list[str]], candidate: list[list[str]]) -> float:
    num_reference, num_candidate = sum(map(len, reference)), sum(map(len, candidate))
    if not num_reference or not num_candidate:
        return 0.0
    hits = _union_hits(reference, candidate)
    precision, recall = hits / num_candidate, hits / num_reference
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def _union_hits(reference: list[list[str]], candidate: list[list[str]]) -> int:
    """Words of the union of longest common subsequences; no word counts more often than either text has it."""
    left = Counter(word for sentence in reference for word in sentence)
    left &= Counter(word for sentence in candidate for word in sentence)
    hits = 0
    for sentence in reference:
        union = set[int]().union(*(lcs_indices(sentence, other) for other in candidate))
        for index in sorted(union):
            if left[sentence[index]] > 0:
                left[sentence[index]] -= 1
                hits += 1
    return hits


def lcs_indices(reference: Sequence[str], candidate: Sequence[str]) -> set[int]:
    """Indices of `reference` that form one longest common subsequence with `candidate`.

    Among equally long ones it is the one that backtracking from the ends finds when it drops reference words first:
    the union over sentences, and so the score, depends on this choice. Rows of the LCS table are kept as bit sets
    (bit j set: the length grows at column j), which makes thousand-word summaries cheap in plain Python.
    """
    rows = _lcs_rows(reference, candidate)
    i, j, found = len(reference), len(candidate), set[int]()
    while i and j:
        if reference[i - 1] == candidate[j - 1]:
            i, j = i - 1, j - 1
            found.add(i)
        elif _length(rows[i], j - 1) > _length(rows[i - 1], j):
            j -= 1
        else:
            i -= 1
    return found


def _lcs_rows(reference: Sequence[str], candidate: Sequence[str]) -> list[int]:
    places: dict[str, int] = {}
    for j, word in enumerate(candidate):
        places[word] = places.get(word, 0) | 1 << j
    rows = [0]
    for word in reference:
        grown = rows[-1] | places.get(word, 0)
        rows.append(grown & ((grown - (rows[-1] << 1 | 1)) ^ grown))
    return rows


def _length(row: int, num_columns: int) -> int:
    return (row & ((1 << num_columns) - 1)).bit_count()
