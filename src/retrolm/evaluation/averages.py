"""From sample scores to the numbers in a table: all averages are unweighted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import UserError


def mean(values: Iterable[float]) -> float:
    """Plain mean; raises `UserError` if there is nothing to average."""
    items = list(values)
    if not items:
        raise UserError("There are no scores to average. Run at least one sample.")
    return sum(items) / len(items)


def percent(scores: Iterable[float]) -> float:
    """Score of a data set as the benchmarks print it: 100 times the mean of sample scores, two decimals."""
    return round(100 * mean(scores), 2)


def by_bucket(scores: Sequence[float], buckets: Sequence[str]) -> dict[str, float]:
    """`percent` for each bucket apart (LongBench-E's length classes), in the order of names."""
    return {
        name: percent(score for score, bucket in zip(scores, buckets, strict=True) if bucket == name)
        for name in sorted(set(buckets))
    }


def average(scores: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    """Mean over tasks, each counted once whatever its number of samples (the paper's "Average").

    Args:
        scores: score by full task name; other tasks are ignored.

    Returns:
        None if one of the tasks has no score: an average over fewer is not comparable.
    """
    return mean(scores[name] for name in tasks) if all(name in scores for name in tasks) else None
