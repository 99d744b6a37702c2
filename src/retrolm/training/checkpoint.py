"""Checkpoints that appear whole or not at all, and resume to the same numbers."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

CHECKPOINT_FILE = "checkpoint.pt"
_NEARLY_NOTHING = 1 << 20  # bytes free on a disk that has just refused some


@dataclass
class TrainState:
    """All that a run needs to go on.

    Attributes:
        step: steps done. model, optimizer: state dicts.
        identity: what the run is bound to: recipe, pool and backbone (plain JSON values).
        tokens, seconds: seen and spent so far.
    """

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    identity: dict[str, Any]
    tokens: int
    seconds: float


def save_state(folder: Path, state: TrainState) -> None:
    """Replace the checkpoint in `folder`; the one before stays until the new one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (CHECKPOINT_FILE + ".part")
    try:
        torch.save(state.__dict__, part)
    except RuntimeError as error:  # torch doesn't say that the disk is full
        full = shutil.disk_usage(folder).free < _NEARLY_NOTHING
        part.unlink(missing_ok=True)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / CHECKPOINT_FILE)) from error
        raise
    part.replace(folder / CHECKPOINT_FILE)


def load_state(folder: Path) -> TrainState | None:
    """Read the checkpoint of `folder`, or None if there is none; raises `UserError` if it can't be read."""
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    try:
        return TrainState(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"The checkpoint {path} can't be read ({reason}). Delete it to start anew.") from None


def refuse_overwriting(folder: Path) -> None:
    """Raise `UserError` if `folder` holds a checkpoint, which a new run would replace."""
    if (folder / CHECKPOINT_FILE).is_file():
        raise UserError(f"{folder} holds the checkpoint of another run. Go on with --resume, or use another folder.")


def check_identity(folder: Path, state: TrainState, identity: Mapping[str, Any]) -> None:
    """Raise `UserError` if the checkpoint belongs to another recipe, pool or backbone; the message names the keys."""
    saved, wanted = dict(_flat(state.identity)), dict(_flat(identity))
    differing = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if differing:
        key = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"The checkpoint in {folder} belongs to another run: {key} was {saved.get(key)!r} and is now "
            f"{wanted.get(key)!r}{more}. Give what it was started with, or use another folder."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
