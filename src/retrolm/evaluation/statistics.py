"""Confidence intervals of mean scores, and paired comparisons. Scores lie between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z95 = 1.959963984540054
_DRAWS = 10_000
_SEED = 0


@dataclass(frozen=True)
class PairedDifference:
    """Mean of (ours - theirs) over shared samples, its 95% interval and two-sided p-value (paired bootstrap)."""

    difference: float
    low: float
    high: float
    p_value: float
    num_pairs: int


def score_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean: Wilson's where every score is 0 or 1, else percentile bootstrap (fixed seed)."""
    if all(score in (0.0, 1.0) for score in scores):
        return _wilson(int(sum(scores)), len(scores))
    means = _resampled_means(np.asarray(scores, dtype=float))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> PairedDifference:
    """Compare two methods on the same samples, given in the same order."""
    gaps = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    means = _resampled_means(gaps)
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    return PairedDifference(
        float(gaps.mean()),
        float(np.quantile(means, 0.025)),
        float(np.quantile(means, 0.975)),
        min(1.0, 2 * tail),
        len(gaps),
    )


def average_interval(scores: Sequence[float], intervals: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% interval of the unweighted mean of independent scores from their own intervals (Zou and Donner 2008)."""
    mean, count = sum(scores) / len(scores), len(scores)
    low = math.sqrt(sum((score - ends[0]) ** 2 for score, ends in zip(scores, intervals, strict=True)))
    high = math.sqrt(sum((ends[1] - score) ** 2 for score, ends in zip(scores, intervals, strict=True)))
    return mean - low / count, mean + high / count


def _wilson(hits: int, count: int) -> tuple[float, float]:
    share, z2 = hits / count, _Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _resampled_means(values: np.ndarray) -> np.ndarray:
    draws = np.random.default_rng(_SEED).integers(0, len(values), (_DRAWS, len(values)))
    return np.asarray(values[draws].mean(1))
