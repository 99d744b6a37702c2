"""`retrolm train ablate`: what each choice of stage 1 is worth."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .screen import note


def ablate(
    config: Annotated[Path, typer.Argument(metavar="LIST", help="Changes to one recipe (configs/ablation/*.toml).")],
    pool: Annotated[Path, typer.Option("--pool", help="Folder written by `retrolm data stage1` for the recipe.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for results and runs; a stopped list goes on there.")],
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of each run.", min=1, show_default="the list's")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Stop each run after so long.", show_default="no limit")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Another backbone.", show_default="the recipe's")] = None,
    only: Annotated[
        list[str], typer.Option("--only", help="Run only this choice or change; may be repeated.", show_default="all")
    ] = [],  # noqa: B006
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="K/N", help="Run only every N-th change from the K-th on, beside other "
                     "processes with the other parts.", show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Train the changes of a list one after the other and write one table of their recall on held-out questions.

    Several processes can share the work and the folder, each with a --part of its own; what has a row isn't run again.
    """
    from ..engine.provenance import provenance
    from ..engine.quiet import silence_libraries
    from ..training.stage1.ablation import TABLE_FILE, load_ablation, run_ablation

    if seconds is not None and not seconds > 0:
        raise UserError(f"--seconds must be a positive number, got {seconds}.")
    given: dict[str, Any] = {"num_steps": steps, "model": model}
    ablation = load_ablation(config, {key: value for key, value in given.items() if value is not None})
    chosen = _part(_chosen(ablation.changes, only), part)
    silence_libraries()
    facts = provenance(["retrolm", *sys.argv[1:]])
    run_ablation(ablation, pool, out, facts, seconds=seconds, only=chosen, on_row=_show)
    print(out / TABLE_FILE)


def _chosen(changes: Any, only: list[str]) -> list[Any]:
    found = [change for change in changes if not only or change.name in only or change.choice in only]
    if not found:
        choices = ", ".join(dict.fromkeys(change.choice for change in changes))
        raise UserError(f"--only {only[0]!r} is no choice or name of the list. Choices: {choices}.")
    return found


def _part(changes: list[Any], part: str | None) -> list[Any]:
    if part is None:
        return changes
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    number, count = (int(text) for text in found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--part must be K/N with K from 1 to N, such as 2/6, got {part!r}.")
    return changes[number - 1 :: count]


def _show(row: dict[str, Any]) -> None:
    shown = " ".join("-" if row[key] is None else f"{row[key]:.3f}" for key in ("recall", "best_recall"))
    note(f"{row['choice']}: {row['name']}: recall and best layer {shown}, {row['steps']} steps")
