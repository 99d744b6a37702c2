"""Other people's prediction files, scored as our own runs are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .statistics import score_interval
from .tasks import EvalSample, Task
from .tasks.files import iter_rows

# What the published harnesses call things: ours and lm-eval's, LongBench's, InfiniteBench's, RULER's.
PREDICTION_KEYS = ("prediction", "pred", "output", "response")
ANSWER_KEYS = ("answers", "ground_truth", "outputs", "answer", "label")
ID_KEYS = ("sample_id", "_id", "id", "index")


def score_predictions(path: Path, task: Task) -> dict[str, Any]:
    """Score a .jsonl (or .jsonl.gz) file with rows of a prediction and its answers.

    Returns:
        {"task", "metric", "score", "score_ci", "num_samples", "scores": {sample id: score}}; scores between 0 and 1.

    Raises:
        UserError: no rows, our own rows of several cells, or a row without prediction or answers, with its number.
    """
    rows = list(iter_rows(path))
    if not rows:
        raise UserError(f"{path} holds no rows. Give a .jsonl file of predictions.")
    if len({row.get("config_hash") for row in rows}) > 1:
        raise UserError(f"{path} holds rows of several tasks, lengths or methods. `retrolm report` shows them apart.")
    samples = [_read(row, number, path, task) for number, row in enumerate(rows, 1)]
    scores = [task.score(prediction, sample) for prediction, sample in samples]
    return {
        "task": task.name,
        "metric": task.metric,
        "score": sum(scores) / len(scores),
        "score_ci": list(score_interval(scores)),
        "num_samples": len(scores),
        "scores": {sample.sample_id: score for (_, sample), score in zip(samples, scores, strict=True)},
    }


def _read(row: dict[str, Any], number: int, path: Path, task: Task) -> tuple[str, EvalSample]:
    answers = _value(row, ANSWER_KEYS, number, path)
    found = answers if isinstance(answers, list) else [answers]
    if not found or None in found:
        raise UserError(f"{path}, row {number}, has no answer to score by. Add it, or remove the row.")
    extra = {"all_classes": row.get("all_classes") or []}
    sample_id = next((str(row[key]) for key in ID_KEYS if key in row), str(number))
    sample = EvalSample(sample_id, task.name, None, "", "", [str(a) for a in found], task.max_new_tokens, extra=extra)
    prediction = _value(row, PREDICTION_KEYS, number, path)
    return "" if prediction is None else str(prediction), sample


def _value(row: dict[str, Any], keys: Sequence[str], number: int, path: Path) -> Any:
    for key in keys:
        if key in row:
            return row[key]
    raise UserError(f"{path}, row {number}, has none of {', '.join(keys)}. Rename its field to {keys[0]!r}.")
