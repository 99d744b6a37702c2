"""What a model that never looked would score: the best constant answer to each kind of question of math_find."""

from __future__ import annotations

from collections import defaultdict

from .tasks.infinitebench_generate import HIGHEST, LOWER_ENDS, RANKS, UPPER_ENDS

MATH_FIND = "infinitebench/math_find"


def math_find_guess() -> float:
    """Expected score of the best constant guess per kind of question, for lists so long that every number occurs."""
    return sum(max(answer_shares(kind).values()) for kind in RANKS) / len(RANKS)


def answer_shares(kind: str) -> dict[float, float]:
    """How often each number is the answer to a kind of question ("largest", …, "median")."""
    shares: dict[float, float] = defaultdict(float)
    for (low, high), share in _bounds(kind):
        for answer, part in _answers(RANKS[kind], low, high).items():
            shares[answer] += share * part
    return dict(shares)


def _bounds(kind: str) -> list[tuple[tuple[int, int], float]]:
    """Ranges that the numbers are drawn from, with their probabilities."""
    upper = [((0, high), 1 / len(UPPER_ENDS)) for high in UPPER_ENDS]
    lower = [((low, HIGHEST), 1 / len(LOWER_ENDS)) for low in LOWER_ENDS]
    if kind == "median":
        return [(ends, share / 2) for ends, share in upper + lower]
    return upper if "largest" in kind else lower


def _answers(rank: int, low: int, high: int) -> dict[float, float]:
    """Answers over a long list of numbers from `low` to `high`, with their probabilities."""
    if rank:
        return {(high + 1 if rank > 0 else low - 1) - rank: 1.0}
    middle = (low + high) / 2  # of an even number of values, where chance tips the list to either side
    return {middle: 1.0} if middle.is_integer() else {middle - 0.5: 0.5, middle + 0.5: 0.5}
