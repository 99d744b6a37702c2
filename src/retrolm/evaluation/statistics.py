"""Confidence intervals of mean scores, and paired comparisons. Scores lie between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z95 = 1.959963984540054
_DRAWS = 10_000
_PART = 1_000  # draws at a time, which bounds memory
_SEED = 0


@dataclass(frozen=True)
class PairedDifference:
    """Mean of (ours - theirs) over shared questions, each task of the same weight.

    Attributes:
        low, high: 95% interval (bootstrap over the questions of each task; over all questions together where a task
            has only one, which tells nothing of how far others would lie from it).
        p_value: two-sided, of `test`: "McNemar" (exact; all scores 0 or 1, one task or tasks of equal size) or
            "sign flips" (permutation).
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    num_pairs: int


def score_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean: percentile bootstrap (fixed seed), or Wilson's where every score is 0 or 1.

    Wilson's holds for all scores between 0 and 1, so it also stands in where equal ones leave nothing to resample.
    """
    if len(set(scores)) == 1 or all(score in (0.0, 1.0) for score in scores):
        return _wilson(sum(scores), len(scores))
    means = _resampled_means(np.asarray(scores, dtype=float), np.random.default_rng(_SEED))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def paired_average(tasks: Sequence[tuple[Sequence[float], Sequence[float]]]) -> PairedDifference:
    """Compare two methods on the average over tasks, from (ours, theirs) of each task's shared questions."""
    gaps = [np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float) for ours, theirs in tasks]
    rng = np.random.default_rng(_SEED)
    low, high = _bootstrap_interval(gaps, rng)
    p_value, test = _paired_test(tasks, gaps, rng)
    difference = float(np.mean([gap.mean() for gap in gaps]))
    return PairedDifference(difference, low, high, p_value, test, sum(map(len, gaps)))


def _bootstrap_interval(gaps: list[np.ndarray], rng: np.random.Generator) -> tuple[float, float]:
    """95% interval of the mean over tasks; from -1 to 1 where there is only one question in all."""
    count = sum(map(len, gaps))
    if count == 1:
        return -1.0, 1.0
    if min(map(len, gaps)) == 1:
        weighted = np.concatenate([gap * (count / (len(gap) * len(gaps))) for gap in gaps])
        means = _resampled_means(weighted, rng).clip(-1, 1)
    else:
        means = np.mean([_resampled_means(gap, rng) for gap in gaps], axis=0)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _paired_test(
    tasks: Sequence[tuple[Sequence[float], Sequence[float]]], gaps: list[np.ndarray], rng: np.random.Generator
) -> tuple[float, str]:
    binary = all(score in (0.0, 1.0) for pair in tasks for scores in pair for score in scores)
    if binary and len({len(gap) for gap in gaps}) == 1:
        every = np.concatenate(gaps)
        return _mcnemar(int((every > 0).sum()), int((every < 0).sum())), "McNemar"
    return _sign_flips(np.concatenate([gap / len(gap) for gap in gaps]), rng), "sign flips"


def _mcnemar(num_better: int, num_worse: int) -> float:
    """Exact two-sided p-value: better and worse are equally likely among the questions that differ."""
    count = num_better + num_worse
    tail = sum(math.comb(count, k) for k in range(min(num_better, num_worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def _sign_flips(weighted: np.ndarray, rng: np.random.Generator) -> float:
    """Share of random sign patterns whose sum is at least as far from 0 as the observed one."""
    parts = [rng.integers(0, 2, (_PART, len(weighted))) * 2 - 1 for _ in range(_DRAWS // _PART)]
    sums = np.concatenate([np.abs(part @ weighted) for part in parts])
    as_far = int((sums >= abs(weighted.sum()) - 1e-12).sum())
    return (1 + as_far) / (1 + _DRAWS)


def average_interval(scores: Sequence[float], intervals: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% interval of the unweighted mean of independent scores from their own intervals (Zou and Donner 2008)."""
    mean, count = sum(scores) / len(scores), len(scores)
    low = math.sqrt(sum((score - ends[0]) ** 2 for score, ends in zip(scores, intervals, strict=True)))
    high = math.sqrt(sum((ends[1] - score) ** 2 for score, ends in zip(scores, intervals, strict=True)))
    return mean - low / count, mean + high / count


def _wilson(hits: float, count: int) -> tuple[float, float]:
    share, z2 = hits / count, _Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    parts = [values[rng.integers(0, len(values), (_PART, len(values)))].mean(1) for _ in range(_DRAWS // _PART)]
    return np.concatenate(parts)
