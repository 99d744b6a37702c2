"""Tiny runs of all three trainings on a backbone loaded from a folder, so that launched processes may shard it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from landmark_run_maker import tiny_landmark_recipe
from retrolm.training.landmark import trainer as landmark
from retrolm.training.loop import TrainingLoop
from retrolm.training.stage1 import backbone as stage1
from retrolm.training.stage1.trainer import Stage1Trainer
from retrolm.training.stage2 import backbone as stage2
from retrolm.training.stage2.trainer import Stage2Trainer
from stage1_run_maker import tiny_recipe
from stage2_run_maker import tiny_stage2_recipe

# A low rate: AdamW's first steps divide a gradient by itself, which blows up the rounding of the smallest ones.
RHYTHM: dict[str, Any] = {"lr": 1e-4, "num_steps": 3, "log_every": 1, "dev_every": 3, "save_every": 0}


def stage1_run(folder: Path, out: Path) -> TrainingLoop[Any]:
    recipe = tiny_recipe(model=str(folder / "model"), accumulate=2, dev_samples=5, **RHYTHM)
    return Stage1Trainer(recipe, stage1.load_backbone(recipe), folder / "pool", out)


def stage2_run(folder: Path, out: Path) -> TrainingLoop[Any]:
    parts = {"model": str(folder / "model"), "retriever": str(folder / "retriever"), "bits": 32}
    recipe = tiny_stage2_recipe(accumulate=2, **parts, **RHYTHM)
    return Stage2Trainer(recipe, stage2.load_backbone(recipe), folder, out)


def landmark_run(folder: Path, out: Path) -> TrainingLoop[Any]:
    recipe = tiny_landmark_recipe(model=str(folder / "model"), accumulate=2, bits=32, **RHYTHM)
    return landmark.LandmarkTrainer(recipe, landmark.load_backbone(recipe), folder, out)


RUNS: dict[str, Callable[[Path, Path], TrainingLoop[Any]]] = {
    "stage1": stage1_run,
    "stage2": stage2_run,
    "landmark": landmark_run,
}
