"""Checkpoints that appear whole or not at all, and resume to the same numbers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError

LATEST = "checkpoint"


@dataclass
class TrainState:
    """All that a run needs to go on: step (done), trained tensors, optimiser state, the recipe."""

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    recipe: dict[str, Any]
    tokens: int
    seconds: float


def save_state(folder: Path, state: TrainState) -> None:
    """Replace the checkpoint in `folder`; the one before stays until the new one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (LATEST + ".part.pt")
    torch.save(state.__dict__, part)
    part.replace(folder / (LATEST + ".pt"))


def load_state(folder: Path) -> TrainState | None:
    """Read the checkpoint of `folder`, or None if there is none; raises `UserError` if it can't be read."""
    path = folder / (LATEST + ".pt")
    if not path.is_file():
        return None
    try:
        return TrainState(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"The checkpoint {path} can't be read ({error}). Delete it to start anew.") from None


def clear(folder: Path) -> None:
    """Remove an earlier run's files from `folder`."""
    if folder.is_dir():
        shutil.rmtree(folder)
