"""The group of processes a run is shared by, through accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs

from ..errors import UserError
from .run_log import require_trackers


def new_accelerator(trackers: Sequence[Any], out: Path, find_unused: bool) -> Accelerator:
    """An accelerator with these trackers; raises `UserError` for one that is unknown or not installed.

    Args:
        find_unused: some trained weights may get no gradient in a step.
    """
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=find_unused)]
    try:
        accelerator = Accelerator(log_with=list(trackers) or None, project_dir=out, kwargs_handlers=handlers)
    except ValueError as error:
        raise UserError(f"Unknown tracker in {', '.join(map(str, trackers))}: {error}") from None
    require_trackers(accelerator, trackers)
    return accelerator


def own_share(accumulate: int, num_processes: int) -> int:
    """Forward passes of each process per step; raises `UserError` if they can't be shared evenly."""
    if accumulate % num_processes:
        raise UserError(
            f"accumulate={accumulate} forward passes can't be shared by {num_processes} processes. "
            f"Use a multiple of {num_processes}: --set accumulate={num_processes}"
        )
    return accumulate // num_processes
