"""`retrolm train`: a page retriever (stage 1), or a backbone on sparse KV (stage 2).

Run it by itself, or under `accelerate launch` on several GPUs.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .data import prepare
from .eval_options import parse_lengths
from .options import JsonFlag
from .output_file import check_writable, write_whole
from .screen import print_json, waiting
from .train_ablate import ablate
from .train_view import report, show_speed, training_progress

command = typer.Typer(help="Train a page retriever, or the backbone on sparse KV.")


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Recipe (TOML) with the tables data and train.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out, if any.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a key of the table train, as key=value; may be repeated.",
                 show_default=False),
]  # fmt: skip
StopOption = Annotated[
    float | None, typer.Option("--stop-after", help="Stop after so many seconds, to be resumed.", show_default=False)
]
TrackerOption = Annotated[
    list[str] | None,
    typer.Option("--tracker", help="Also log to a tracker: tensorboard, wandb, …; may be repeated.",
                 show_default=False),
]  # fmt: skip


@command.callback()
def _group() -> None:
    """Train a page retriever (stage 1), or the backbone on sparse KV (stage 2)."""


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
    measure_speed: Annotated[
        int | None,
        typer.Option("--measure-speed", help="Don't train: time so many batches beside plain forward passes (JSON).",
                     show_default=False, min=1),
    ] = None,
) -> None:  # fmt: skip
    """Train a page retriever on a frozen backbone (stage 1), with checkpoints."""
    from ..training.stage1.config import load_recipe

    recipe = load_recipe(config, parse_overrides(settings or ()))
    _check_stop(stop_after)
    trainer = _stage1_trainer(recipe, pool, out, data_root, trackers or ())
    if measure_speed:
        from ..engine.provenance import provenance
        from ..training.stage1.speed import training_speed

        print_json({**training_speed(trainer, measure_speed), **provenance(["retrolm", *sys.argv[1:]])})
        return trainer.close()
    complete = _run(trainer, recipe.train.num_steps, resume, stop_after)
    if trainer.accelerator.is_main_process:
        report(trainer, complete, "Retriever", trainer.retriever_folder)
    trainer.close()


@command.command("stage2")
def stage2(
    config: ConfigArgument,
    data_root: Annotated[Path, typer.Option("--data-root", help="Folder that the recipe's paths are relative to.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoint, log and what is trained.")],
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
    complete = _run(trainer, recipe.train.num_steps, resume, stop_after)
    if trainer.accelerator.is_main_process:
        what = "Adapter" if trainer.step_module.adapter is not None else "Model"
        report(trainer, complete, what, trainer.artefact_folder)
    trainer.close()


@command.command("speed")
def speed(
    config: ConfigArgument,
    lengths: Annotated[str, typer.Option(help="Tokens per text, parted by commas.")] = "4096,12288,32768",
    repeats: Annotated[int, typer.Option(help="Measured passes of each kind; medians are shown.", min=1)] = 3,
    settings: SettingsOption = None,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this file, as JSON.")] = None,
    as_json: JsonFlag = False,
) -> int:
    """Time stage-2 training on sparse KV beside full attention: forward and backward, in interleaved pairs.

    Texts are random tokens, one per pass, without optimiser steps. First the loss at a budget that holds the text is
    compared with the stock model's; if it differs no speed-up is shown, and the exit code is 1.
    """
    from ..training.stage2.config import load_recipe

    recipe = load_recipe(config, parse_overrides(settings or ()))
    sizes = [size for size in parse_lengths(lengths) if size is not None]
    check_writable(output)
    step = _stage2_step(recipe)
    from ..engine.provenance import provenance
    from ..training.stage2.speed import measure_speed

    found = {**measure_speed(step, recipe.train, sizes, repeats, show_speed), **provenance(["retrolm", *sys.argv[1:]])}
    if output is not None:
        write_whole(output, json.dumps(found, indent=2) + "\n")
    if as_json:
        print_json(found)
    return 0 if found["equal"] else 1


command.command("ablate")(ablate)


def _check_stop(stop_after: float | None) -> None:
    if stop_after is not None and not stop_after > 0:
        raise UserError(f"--stop-after must be a positive number of seconds, got {stop_after}.")


def _run(trainer: Any, num_steps: int, resume: bool, stop_after: float | None) -> bool:
    with training_progress(num_steps, trainer.accelerator.is_main_process) as trainer.on_row:
        complete: bool = trainer.run(resume, stop_after)
    return complete


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn ["key=value", …] into values as TOML reads them; what is no TOML value is text. Raises `UserError`."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UserError(f"--set needs key=value, got {pair!r}. For example: --set lr=1e-3")
        if key in found:
            raise UserError(f"--set {key} is given twice. Give it once.")
        found[key] = _toml_value(text.strip())
    return found


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _stage1_trainer(recipe: Any, pool: Path, out: Path, data_root: Path | None, trackers: Sequence[str]) -> Any:
    with waiting(f"Loading {recipe.train.model} …"):
        from accelerate import PartialState

        from ..engine.quiet import silence_libraries
        from ..training.stage1.backbone import load_backbone
        from ..training.stage1.trainer import Stage1Trainer

        silence_libraries()
        with PartialState().main_process_first():
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


def _stage2_step(recipe: Any) -> Any:
    with waiting(f"Loading {recipe.train.model} …"):
        from ..engine.quiet import silence_libraries
        from ..training.stage2.speed import load_step

        silence_libraries()
        return load_step(recipe)
