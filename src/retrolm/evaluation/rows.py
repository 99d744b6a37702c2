"""Rows of results: one per sample, and cells that sum them up. Scores are between 0 and 1, times in seconds."""

from __future__ import annotations

import hashlib
import json
import statistics as stats
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from .readers import GREEDY, Prediction
from .statistics import score_interval
from .tasks import EvalSample, Task
from .variants import settings_of

FORMAT = 1
LABELS = ("bucket", "difficulty", "length_class", "domain")
_IDENTITY = ("task", "length", "model", "dtype", "retriever", "adapter", "method", "prefill", "kv_budget", "seed")
_PROVENANCE = ("commit", "versions", "hardware", "command")
# What every sample row has, broken ones too.
ROW_KEYS = (
    "key",
    "config_hash",
    "sample_id",
    *_IDENTITY,
    "metric",
    "labels",
    "score",
    "failed",
    "total_s",
    "batch_size",
)


def cell_identity(task: Task, length: int | None, seed: int, facts: dict[str, Any]) -> dict[str, Any]:
    """All that decides the scores of a cell but the code and the samples themselves."""
    return {
        "format": FORMAT,
        "task": task.name,
        "length": length,
        "seed": seed,
        "metric": task.metric,
        "chat": task.chat,
        "generation": GREEDY,
        **facts,
    }


def digest(value: Any) -> str:
    """Short hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def sample_key(identity: dict[str, Any], sample: EvalSample) -> str:
    """Hash of everything that determines one sample's answer and score, code aside."""
    return digest({"cell": identity, "sample": sample.to_json()})


def sample_row(
    identity: dict[str, Any],
    sample: EvalSample,
    task: Task,
    outcome: Prediction | str,
    measured: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """The row of one sample; an `outcome` that is an error's text scores 0."""
    head: dict[str, Any] = {"key": sample_key(identity, sample), "config_hash": digest(identity)}
    head |= {"sample_id": sample.sample_id, **{key: identity[key] for key in _IDENTITY}, "metric": task.metric}
    head |= {"settings": settings_of(identity)}
    head |= {"labels": {key: sample.extra[key] for key in LABELS if key in sample.extra}}
    tail = {**measured, **{key: provenance[key] for key in (*_PROVENANCE, "measured_at")}}
    if isinstance(outcome, str):
        return {**head, "score": 0.0, "failed": True, "error": outcome, **tail}
    found = asdict(outcome)
    prediction, pages = found.pop("text"), found.pop("pages")
    scored = {
        "score": task.score(prediction, sample),
        "extra_scores": task.extra_scores(prediction, sample),
        "failed": False,
        "prediction": prediction,
        "answers": sample.answers,
    }
    return {**head, **scored, **found, **({"pages": pages} if pages is not None else {}), **tail}


def cells_of(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per cell, in the order in which cells first appear; of several rows of a sample the last counts."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["config_hash"], {})[row["sample_id"]] = row
    return [_cell(list(samples.values())) for samples in found.values()]


def cell_name(cell: dict[str, Any]) -> str:
    """A cell in words: task, length, method, budget, retriever."""
    parts = [cell["task"], str(cell["length"] or "natural"), cell["method"]]
    parts += [f"budget {cell['kv_budget']}"] if cell["kv_budget"] else []
    parts += [f"retriever {cell['retriever']}"] if cell["retriever"] else []
    return " · ".join(parts)


def _cell(rows: list[dict[str, Any]]) -> dict[str, Any]:
    scores, good = [row["score"] for row in rows], [row for row in rows if not row["failed"]]
    extra = sorted({name for row in good for name in row["extra_scores"]})
    return {
        **{key: rows[0][key] for key in _IDENTITY},
        "settings": rows[-1].get("settings", ""),  # rows of earlier versions don't say
        "metric": rows[0]["metric"],
        "score": sum(scores) / len(scores),
        "score_ci": list(score_interval(scores)),
        "extra_scores": {name: sum(row["extra_scores"].get(name, 0.0) for row in good) / len(rows) for name in extra},
        "num_samples": len(rows),
        "num_failed": len(rows) - len(good),
        "num_truncated": sum(row["truncated"] for row in good),
        "num_tokens": stats.fmean(row["num_tokens"] for row in good) if good else None,
        "beyond_window": any(row["beyond_window"] for row in rows),
        "attended_tokens": _most(row["attended_tokens"] for row in good),
        "kv_bytes": _most(row["kv_bytes"] for row in good),
        **{name: _median(good, name) for name in ("ttft_s", "tpot_s", "total_s")},
        "peak_device_bytes": max(row["peak_device_bytes"] for row in rows),
        "peak_host_bytes": max(row["peak_host_bytes"] for row in rows),
        "batch_size": max(row["batch_size"] for row in rows),
        "config_hash": rows[0]["config_hash"],
        **{key: _distinct(row[key] for row in rows) for key in _PROVENANCE},
    }


def _most(values: Iterable[dict[str, int]]) -> dict[str, int]:
    """Largest value of each key."""
    found: dict[str, int] = {}
    for value in values:
        found |= {key: max(number, found.get(key, 0)) for key, number in value.items()}
    return found


def _median(rows: list[dict[str, Any]], name: str) -> float | None:
    return stats.median(row[name] for row in rows) if rows else None


def _distinct(values: Iterable[Any]) -> Any:
    """The one value that all rows share, or the list of those that occur."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found[0] if len(found) == 1 else found
