"""What the evaluation commands share: options, and how they are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .screen import note

if TYPE_CHECKING:
    from ..evaluation.runner import DataOptions, SampleSet

TaskOption = Annotated[
    list[str], typer.Option("--task", help="Task or group (ruler-needles, longbench-qa6, …); may be repeated.")
]
ModelOption = Annotated[str, typer.Option(help="Name of a pulled model, a folder, or a Hugging Face id.")]
LengthsOption = Annotated[str, typer.Option(help="Prompt lengths in tokens, parted by commas (4096,8192), or natural.")]
SamplesOption = Annotated[int | None, typer.Option(help="Samples per task and length.", min=1, show_default="all")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
DataOption = Annotated[Path | None, typer.Option(help="Folder with data sets, or hub.", show_default="none")]
CacheOption = Annotated[Path | None, typer.Option(help="Folder that keeps generated samples.", show_default="none")]
DtypeOption = Annotated[str, typer.Option(help="Arithmetic of the model: auto, float32, bfloat16, float16.")]
PageSizeOption = Annotated[int, typer.Option(help="Tokens per page.")]
RetrieverOption = Annotated[
    list[str], typer.Option("--retriever", help="auto, none (untrained), a folder or a shipped name; may be repeated.")
]
TaskSettings = Annotated[
    list[str], typer.Option("--task-option", help="Option of tasks, as key=value (essays=FOLDER); may be repeated.")
]
SetOption = Annotated[list[str], typer.Option("--set", help="Any other option of RetroConfig, as key=value.")]


def parse_lengths(text: str) -> list[int | None]:
    """Lengths in tokens, in the order given; None for "natural". Raises `UserError` for anything else."""
    found: list[int | None] = []
    for part in text.replace("_", "").split(","):
        word = part.strip()
        if word != "natural" and not (word.isdecimal() and int(word) > 0):
            raise UserError(f"--lengths must be whole numbers parted by commas, or natural, got {part!r}.")
        found.append(None if word == "natural" else int(word))
    return found


def model_label(model: str) -> str:
    """How a model is called in the rows: the last part of a folder's path, else its name."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def run_provenance() -> dict[str, Any]:
    """Facts of this run that every row states."""
    from ..engine.provenance import provenance

    return provenance(["retrolm", *sys.argv[1:]])


def make_sets(tokenizer: Any, names: list[str], sizes: list[int | None], options: DataOptions) -> list[SampleSet]:
    """Make all samples before the first answer, so that missing data is known at once."""
    from ..evaluation.runner import sample_sets

    sets = []
    for part in sample_sets(tokenizer, names, sizes, options):
        sets.append(part)
        note(f"{part.task.name} · {part.length or 'natural'}: {len(part.samples)} samples")
    return sets


def parse_task_options(pairs: list[str]) -> dict[str, Any]:
    """Turn ["key=value", …] into options of tasks; true and false become booleans. Raises `UserError`."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--task-option needs key=value, got {pair!r}. For example: --task-option essays=books")
        found[key] = {"true": True, "false": False}.get(value, value)
    return found
