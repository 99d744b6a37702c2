"""`retrolm train recall`: retrievers beside one another on held-out texts of a recipe."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .eval_options import parse_lengths
from .output_file import check_writable, write_whole
from .screen import show_table, waiting
from .train_options import ConfigArgument, SettingsOption, parse_overrides


def recall(
    config: ConfigArgument,
    pool: Annotated[Path, typer.Option("--pool", help="Folder written by `retrolm data stage1` for the recipe.")],
    retriever: Annotated[
        list[str], typer.Option("--retriever", help="Folder, shipped name, or none (untrained); may be repeated.")
    ],
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens per text, parted by commas.")] = "8192,16384",
    texts: Annotated[int, typer.Option("--texts", help="Texts of each length.", min=1)] = 48,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Only this kind of text (people, facts, registers, …); may be repeated, then each "
                     "is as frequent as the others. All kinds, as the recipe mixes them, when left out.",
                     show_default=False),
    ] = None,
    settings: SettingsOption = None,
    output: Annotated[Path | None, typer.Option(help="Also write the rows to this file, as JSON lines.")] = None,
) -> None:  # fmt: skip
    """Measure retrievers on the same held-out texts of a recipe, by length and by kind of text: to choose by, no test.

    Texts and planted facts come from the dev split of the pool, so nothing here touches an evaluation set.
    """
    from ..training.stage1.config import load_recipe
    from ..training.stage1.held_out import only_kinds

    sizes = [size for size in parse_lengths(lengths) if size is not None]
    if not sizes:
        raise UserError("--lengths must name at least one number of tokens.")
    check_writable(output)
    recipe = load_recipe(config, {**parse_overrides(settings or ()), "dev_max_tokens": max(sizes)})
    if kind:
        recipe = dataclasses.replace(recipe, data=only_kinds(recipe.data, kind))
    rows = _measured(recipe, pool, retriever, sizes, texts)
    _show(rows)
    if output is not None:
        from ..engine.provenance import provenance

        facts = {"model": recipe.train.model, **provenance(["retrolm", *sys.argv[1:]])}
        write_whole(output, "".join(json.dumps({**row, **facts}) + "\n" for row in rows))


def _measured(recipe: Any, pool: Path, names: list[str], sizes: list[int], texts: int) -> list[dict[str, Any]]:
    with waiting(f"Loading {recipe.train.model} …"):
        from ..engine.quiet import silence_libraries
        from ..engine.shipped import resolve_retriever
        from ..retriever import load_retriever
        from ..training.stage1.backbone import load_backbone
        from ..training.stage1.comparison import compared
        from ..training.stage1.trainer import first_retriever

        silence_libraries()
        lm = load_backbone(recipe)
        shape = lm.backbone.projection_shapes(), lm.backbone.fingerprint()
        untrained = dataclasses.replace(recipe.train, init_from="")
        found = {
            name: first_retriever(lm, untrained) if name == "none" else load_retriever(resolve_retriever(name), *shape)
            for name in names
        }
    return list(compared(recipe, lm, pool, found, sizes, texts))


def _show(rows: list[dict[str, Any]]) -> None:
    """All questions, then by kind of text: those that were asked."""
    names = "length", "agreed, with words", "each layer", "best layer"
    cells = [(row["retriever"], str(row["length"]), *(_share(row[key]) for key in ("agreed", "mean", "best")))
             for row in rows]  # fmt: skip
    show_table(("retriever", *names), cells, right=range(1, 5))
    kinds = [kind for kind in rows[0]["kinds"] if any(row["asked"][kind] for row in rows)]
    cells = [(row["retriever"], kind, str(row["asked"][kind]), str(row["length"]), _share(row["agreed_kinds"][kind]),
              _share(row["kinds"][kind])) for kind in kinds for row in rows]  # fmt: skip
    show_table(("retriever", "kind", "questions", *names[:3]), cells, title="\nBy kind of text",
               right=range(2, 6))  # fmt: skip


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
