"""`retrolm train speed`: what training costs, of the stage that a recipe is for."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .eval_options import parse_lengths
from .options import JsonFlag
from .output_file import check_writable, write_whole
from .screen import print_json, waiting
from .train_options import ConfigArgument, SettingsOption, parse_overrides
from .train_view import show_cost, show_speed

LENGTHS, REPEATS, BATCHES = "4096,12288,32768", 3, 12


def speed(
    config: ConfigArgument,
    pool: Annotated[
        Path | None,
        typer.Option("--pool", help="Stage 1: folder written by `retrolm data stage1`.", show_default=False),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="Stage 1: a random backbone of this shape and random texts in place of model and "
                     "pool: a name under configs/shapes, or a JSON file.", show_default=False),
    ] = None,
    batches: Annotated[
        int | None, typer.Option("--batches", help="Stage 1: measured batches.", min=1, show_default=str(BATCHES))
    ] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Stage 2: tokens per text, parted by commas.", show_default=LENGTHS)
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", help="Stage 2: measured passes of each kind; medians are shown.", min=1,
                     show_default=str(REPEATS)),
    ] = None,
    settings: SettingsOption = None,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this file, as JSON.")] = None,
    as_json: JsonFlag = False,
) -> int:  # fmt: skip
    """Time the training of a recipe; nothing that was trained is kept.

    Stage 1: whole steps on the pool's texts beside plain forward passes of the backbone, and each part of a step.

    Stage 2: forward and backward passes on sparse KV beside full attention, in interleaved pairs, over random tokens.
    First the loss at a budget that holds the text is compared with the stock model's; if it differs no speed-up is
    shown, and the exit code is 1.
    """
    first = _is_stage1(config)
    of_stage1 = {"--pool": pool, "--shape": shape, "--batches": batches}
    others = {"--lengths": lengths, "--repeats": repeats} if first else of_stage1
    _refuse_others(config, 1 if first else 2, others)
    check_writable(output)
    overrides = parse_overrides(settings or ())
    if first:
        found = _stage1(config, overrides, pool, shape, batches or BATCHES)
    else:
        found = _stage2(config, overrides, lengths or LENGTHS, repeats or REPEATS)
    from ..engine.provenance import provenance

    found |= provenance(["retrolm", *sys.argv[1:]])
    if output is not None:
        write_whole(output, json.dumps(found, indent=2) + "\n")
    if as_json:
        print_json(found)
    return 0 if found.get("equal", True) else 1


def _is_stage1(config: Path) -> bool:
    """Whether a recipe is for stage 1, whose texts are made of sources; raises `UserError`."""
    from ..training.recipe import read_tables

    return "sources" in read_tables(config, "data", "train")["data"]


def _refuse_others(config: Path, stage: int, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{config} is a recipe of stage {stage}, which {name} has no meaning for. Leave it out.")


def _stage1(
    config: Path, overrides: dict[str, Any], pool: Path | None, shape: str | None, batches: int
) -> dict[str, Any]:
    from ..training.stage1.config import load_recipe

    recipe = load_recipe(config, overrides)
    if (pool is None) == (shape is None):
        raise UserError(f"{config} is a recipe of stage 1. Name its prepared texts with --pool, or a --shape.")
    with tempfile.TemporaryDirectory() as out:
        with waiting(f"Loading {shape or recipe.train.model} …"):
            from ..engine.quiet import silence_libraries
            from ..training.stage1.speed import training_speed

            silence_libraries()
            trainer = _stage1_trainer(recipe, pool, shape, Path(out))
        found = {"model": shape or recipe.train.model, **training_speed(trainer, batches)}
        trainer.close()
    show_cost(found)
    return found


def _stage1_trainer(recipe: Any, pool: Path | None, shape: str | None, out: Path) -> Any:
    if shape is None:
        from ..training.stage1.backbone import load_backbone
        from ..training.stage1.trainer import Stage1Trainer

        return Stage1Trainer(recipe, load_backbone(recipe), pool, out)
    import torch

    from ..training.stage1.dry_run import DryTrainer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return DryTrainer(recipe, shape, device, out)


def _stage2(config: Path, overrides: dict[str, Any], lengths: str, repeats: int) -> dict[str, Any]:
    from ..training.stage2.config import load_recipe

    recipe = load_recipe(config, overrides)
    sizes = [size for size in parse_lengths(lengths) if size is not None]
    with waiting(f"Loading {recipe.train.model} …"):
        from ..engine.quiet import silence_libraries
        from ..training.stage2.speed import load_step, measure_speed

        silence_libraries()
        step = load_step(recipe)
    return measure_speed(step, recipe.train, sizes, repeats, show_speed)
