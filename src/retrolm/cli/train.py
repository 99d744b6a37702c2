"""`retrolm train`: a page retriever (stage 1), a backbone on sparse KV (stage 2), or Landmark Attention.

Run it by itself, or under `accelerate launch` on several GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .data import prepare
from .screen import waiting
from .train_ablate import ablate
from .train_options import ConfigArgument, SettingsOption, parse_overrides
from .train_recall import recall
from .train_speed import speed
from .train_view import report, training_progress

command = typer.Typer(help="Train a page retriever, the backbone on sparse KV, or landmarks.")


ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out, if any.")]
StopOption = Annotated[
    float | None, typer.Option("--stop-after", help="Stop after so many seconds, to be resumed.", show_default=False)
]
DataRootOption = Annotated[Path, typer.Option("--data-root", help="Folder that the recipe's paths are relative to.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder for checkpoint, log and what is trained.")]
TrackerOption = Annotated[
    list[str] | None,
    typer.Option("--tracker", help="Also log to a tracker: tensorboard, wandb, …; may be repeated.",
                 show_default=False),
]  # fmt: skip


@command.callback()
def _group() -> None:
    """Train a page retriever (stage 1), the backbone on sparse KV (stage 2), or landmarks."""


@command.command("stage1")
def stage1(
    config: ConfigArgument,
    pool: Annotated[Path, typer.Option("--pool", help="Folder written by `retrolm data stage1`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoint, log and retriever.")],
    resume: ResumeOption = False,
    settings: SettingsOption = None,
    stop_after: StopOption = None,
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", help="Prepare --pool from this folder first, if it isn't there.",
                     show_default=False),
    ] = None,
    trackers: TrackerOption = None,
) -> None:  # fmt: skip
    """Train a page retriever on a frozen backbone (stage 1), with checkpoints."""
    from ..training.stage1.config import load_recipe

    recipe = load_recipe(config, parse_overrides(settings or ()))
    _check_stop(stop_after)
    trainer = _stage1_trainer(recipe, pool, out, data_root, trackers or ())
    _run(trainer, resume, stop_after, "Retriever", trainer.retriever_folder)


@command.command("stage2")
def stage2(
    config: ConfigArgument,
    data_root: DataRootOption,
    out: OutOption,
    resume: ResumeOption = False,
    settings: SettingsOption = None,
    stop_after: StopOption = None,
    trackers: TrackerOption = None,
) -> None:
    """Train a backbone on sparse KV by language modelling on long documents (stage 2), with checkpoints.

    The result is a LoRA adapter (`--adapter` of the other commands), or a model with its retriever.
    """
    from ..training.stage2.config import load_recipe

    recipe = load_recipe(config, parse_overrides(settings or ()))
    _check_stop(stop_after)
    trainer = _stage2_trainer(recipe, data_root, out, trackers or ())
    what = "Adapter" if trainer.step_module.adapter is not None else "Model"
    complete = _run(trainer, resume, stop_after, what, trainer.artefact_folder)
    if complete and trainer.accelerator.is_main_process and trainer.retriever_folder is not None:
        print(f"Retriever: {trainer.retriever_folder}")


@command.command("landmark")
def landmark(
    config: ConfigArgument,
    data_root: DataRootOption,
    out: OutOption,
    resume: ResumeOption = False,
    settings: SettingsOption = None,
    stop_after: StopOption = None,
    trackers: TrackerOption = None,
) -> None:
    """Train Landmark Attention by language modelling in a short context, with checkpoints.

    The result is a folder with the landmarks' embedding and a LoRA adapter, for `--set landmark.weights=FOLDER`.
    """
    from ..training.landmark.config import load_recipe

    recipe = load_recipe(config, parse_overrides(settings or ()))
    _check_stop(stop_after)
    trainer = _landmark_trainer(recipe, data_root, out, trackers or ())
    _run(trainer, resume, stop_after, "Landmarks", trainer.artefact_folder)


command.command("speed")(speed)
command.command("ablate")(ablate)
command.command("recall")(recall)


def _check_stop(stop_after: float | None) -> None:
    if stop_after is not None and not stop_after > 0:
        raise UserError(f"--stop-after must be a positive number of seconds, got {stop_after}.")


def _run(trainer: Any, resume: bool, stop_after: float | None, what: str, folder: Path) -> bool:
    """Train, and say what was written where; returns whether all steps are done."""
    is_main = trainer.accelerator.is_main_process
    with training_progress(trainer.recipe.train.num_steps, is_main) as trainer.on_row:
        complete: bool = trainer.run(resume, stop_after)
    if is_main:
        report(trainer, complete, what, folder)
    trainer.close()
    return complete


def _stage1_trainer(recipe: Any, pool: Path, out: Path, data_root: Path | None, trackers: Sequence[str]) -> Any:
    with waiting(f"Loading {recipe.train.model} …"):
        from ..engine.quiet import silence_libraries
        from ..training.processes import join
        from ..training.stage1.backbone import load_backbone
        from ..training.stage1.trainer import Stage1Trainer

        silence_libraries()
        with join().main_process_first():
            if data_root is not None and not (pool / "manifest.json").is_file():
                prepare(recipe.data, recipe.train.model, data_root, pool)
        return Stage1Trainer(recipe, load_backbone(recipe), pool, out, trackers=trackers)


def _stage2_trainer(recipe: Any, data_root: Path, out: Path, trackers: Sequence[str]) -> Any:
    with waiting(f"Loading {recipe.train.model} …"):
        from ..engine.quiet import silence_libraries
        from ..training.stage2.backbone import load_backbone
        from ..training.stage2.trainer import Stage2Trainer

        silence_libraries()
        return Stage2Trainer(recipe, load_backbone(recipe), data_root, out, trackers=trackers)


def _landmark_trainer(recipe: Any, data_root: Path, out: Path, trackers: Sequence[str]) -> Any:
    with waiting(f"Loading {recipe.train.model} …"):
        from ..engine.quiet import silence_libraries
        from ..training.landmark.trainer import LandmarkTrainer, load_backbone

        silence_libraries()
        return LandmarkTrainer(recipe, load_backbone(recipe), data_root, out, trackers=trackers)
