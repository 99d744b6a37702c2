"""`retrolm train`: train a page retriever. Run it by itself, or under `accelerate launch` on several GPUs."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import UserError
from .data import prepare
from .screen import ERR, count, note, seconds, size, waiting

command = typer.Typer(help="Train a page retriever.")


@command.callback()
def _group() -> None:
    """Train a page retriever."""


@command.command("stage1")
def stage1(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Recipe (TOML) with [data] and [train] tables.")],
    pool: Annotated[Path, typer.Option("--pool", help="Folder written by `retrolm data stage1`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoint, log and retriever.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out, if any.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace a key of the [train] table, as key=value; may be repeated.",
                     show_default=False),
    ] = None,
    stop_after: Annotated[
        float | None,
        typer.Option("--stop-after", help="Stop after so many seconds, to be resumed.", show_default=False),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", help="Prepare --pool from this folder first, if it isn't there.",
                     show_default=False),
    ] = None,
    trackers: Annotated[
        list[str] | None,
        typer.Option("--tracker", help="Also log to a tracker: tensorboard, wandb, …; may be repeated.",
                     show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Train a page retriever on a frozen backbone (stage 1), with checkpoints."""
    from ..training.stage1.config import load_recipe

    recipe = load_recipe(config, parse_overrides(settings or ()))
    if stop_after is not None and not stop_after > 0:
        raise UserError(f"--stop-after must be a positive number of seconds, got {stop_after}.")
    trainer = _load_trainer(recipe, pool, out, data_root, trackers or ())
    with _progress(recipe.train.num_steps, trainer.accelerator.is_main_process) as trainer.on_row:
        complete = trainer.run(resume, stop_after)
    if trainer.accelerator.is_main_process:
        _report(trainer, complete)
    trainer.close()


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


def _load_trainer(recipe: Any, pool: Path, out: Path, data_root: Path | None, trackers: Sequence[str]) -> Any:
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


@contextmanager
def _progress(num_steps: int, shown: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show a bar on a terminal, a line per row elsewhere, nothing on other processes; yields what takes the rows."""
    if not shown or not ERR.is_terminal:
        yield (lambda row: note(row_text(row))) if shown else (lambda row: None)
        return
    columns = (TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=ERR) as progress:
        task = progress.add_task("", total=num_steps)

        def update(row: dict[str, Any]) -> None:
            if "dev_recall" in row:
                progress.console.print(row_text(row), style="dim")
            else:
                progress.update(task, completed=row["step"], description=_figures(row))

        yield update


def row_text(row: dict[str, Any]) -> str:
    """One line for a row of the log."""
    if "dev_recall" in row:
        found = row["dev_recall"]
        return f"step {row['step']}: dev recall@8 {_share(found['mean'])} (best layer {_share(found['best'])})"
    return f"step {row['step']}: {_figures(row)}"


def _figures(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.3f}", f"recall@8 {_share(row['recall8'])}", f"{count(row['tokens_per_s'])} tokens/s"]
    if row["peak_device_bytes"]:
        parts.append(f"peak {size(row['peak_device_bytes'])}")
    return " · ".join(parts)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _report(trainer: Any, complete: bool) -> None:
    done = f"{count(trainer.step)} steps, {count(trainer.tokens)} tokens, {seconds(trainer.seconds)}"
    if complete:
        print(f"Trained: {done}. Retriever: {trainer.retriever_folder}")
    else:
        print(f"Stopped at {done}. Go on with --resume.")
