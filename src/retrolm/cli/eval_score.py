"""`retrolm eval score`: other people's predictions by our scorers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .options import JsonFlag
from .screen import print_json


def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Predictions as .jsonl, with the answers in each row.")],
    task: Annotated[str, typer.Option(help="Task whose scorer is used, such as longbench/qasper.")],
    as_json: JsonFlag = False,
) -> None:
    """Score a file of predictions (LongBench's, InfiniteBench's, RULER's or our own rows)."""
    from ..evaluation.predictions import score_predictions
    from ..evaluation.tasks import get_task

    if not file.is_file():
        raise UserError(f"There is no file {file}. Give a .jsonl file of predictions.")
    found = score_predictions(file, get_task(task))
    if as_json:
        print_json(found)
        return
    low, high = found["score_ci"]
    print(f"{task}: {100 * found['score']:.2f} [{100 * low:.2f}, {100 * high:.2f}], {found['num_samples']} samples")
