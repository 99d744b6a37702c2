"""`retrolm data`: prepare training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .options import JsonFlag
from .screen import count, note, print_json, show_table, size, waiting

command = typer.Typer(help="Prepare training data.")

RecipeArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Recipe (TOML) with a table data.")]
DataRoot = Annotated[Path, typer.Option("--data-root", help="Folder that the recipe's paths are relative to.")]


@command.callback()
def _group() -> None:
    """Prepare training data."""


@command.command("stage1")
def stage1(
    config: RecipeArgument,
    data_root: DataRoot,
    out: Annotated[Path, typer.Option("--out", help="New folder for the pool.")],
    model: Annotated[
        str, typer.Option("--model", help="Model whose tokenizer is used.", show_default="the recipe's")
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Read the recipe's sources, tokenise them once and write the pool that `retrolm train stage1` trains on."""
    from ..training.data import load_stage1_data_config
    from ..training.stage1.config import load_recipe

    table = load_stage1_data_config(config)
    manifest = prepare(table, model or load_recipe(config).train.model, data_root, out)
    if as_json:
        print_json(manifest)
        return
    show_table(("source", "kept", "skipped"), list(_source_rows(manifest)), right=(1,))
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    questions = sum(sum(counts.values()) for counts in manifest["num_questions"].values())
    note(
        f"\n{out}: {count(questions)} questions, {count(manifest['num_passages'])} passages, "
        f"{count(manifest['num_books'])} books; {size(num_bytes)}"
    )


@command.command("stage2")
def stage2(
    source: Annotated[Path, typer.Argument(help="Long documents: .txt, .jsonl (.gz, .zst), .parquet, or a folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for train.jsonl.gz and held_out.jsonl.gz.")],
    held_out: Annotated[int, typer.Option(help="Documents held out.", min=1)] = 32,
    excerpt_chars: Annotated[int, typer.Option(help="Characters kept of each document; 0 = all.", min=0)] = 0,
    held_out_chars: Annotated[int, typer.Option(help="The same for documents held out.", min=0)] = 0,
    planted: Annotated[
        int, typer.Option(help="Add so many texts with planted facts, which end in questions on them.", min=0)
    ] = 0,
    passages: Annotated[
        int, typer.Option(help="Add so many texts of passages of --pairs, which end in questions on them.", min=0)
    ] = 0,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Folder with pairs.jsonl.gz (questions, answers) and passages.jsonl.gz.", show_default=False),
    ] = None,
    drop: Annotated[list[str], typer.Option(help="Source of --pairs to leave out; may be repeated.")] = [],  # noqa: B006
    keep_out: Annotated[
        list[Path], typer.Option(help="Evaluation file whose questions and passages are left out; may be repeated.")
    ] = [],  # noqa: B006
    asking_chars: Annotated[int, typer.Option(help="Characters of the longest of these texts.", min=2000)] = 42000,
    as_json: JsonFlag = False,
) -> None:
    """Split long documents into a part to train on and a part held out, as excerpts.

    `retrolm train stage2` reads any such files as they are, too.
    """
    from ..training.stage2.asking import AskingDocuments, answered_rows
    from ..training.stage2.split import split_documents

    if (passages > 0) != (pairs is not None):
        raise UserError("--passages and --pairs belong together: give both, or neither.")
    with waiting("Splitting …"):
        rows = [] if pairs is None else answered_rows(pairs, drop, keep_out)
        asking = AskingDocuments(planted, passages, rows, asking_chars)
        found = split_documents(source, out, held_out, excerpt_chars, held_out_chars, asking)
    if as_json:
        print_json(found)
        return
    cells = [(name, *(count(part[key]) for key in ("documents", "chars", "turns")), size((out / name).stat().st_size))
             for name, part in found.items()]  # fmt: skip
    show_table(("file", "documents", "characters", "questions", "bytes"), cells, right=(1, 2, 3, 4))


def prepare(table: Any, model: str, data_root: Path, out: Path) -> dict[str, Any]:
    """Prepare a pool in the new folder `out`; returns its manifest. Raises `UserError` if it holds one already."""
    from ..engine.quiet import silence_libraries
    from ..engine.tokenizer import load_tokenizer
    from ..training.data import prepare_pool

    if (out / "manifest.json").is_file():
        raise UserError(f"{out} holds a pool already. Name another folder, or delete this one.")
    silence_libraries()
    with waiting("Preparing the pool …"):
        return prepare_pool(table, load_tokenizer(model), out, data_root, progress=note)


def _source_rows(manifest: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (name, count(rows["kept"]), ", ".join(f"{count(n)} {reason}" for reason, n in rows["skipped"].items()))
        for name, rows in manifest["rows"].items()
    ]
