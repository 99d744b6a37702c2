"""`retrolm eval generation`: how far methods stray from full attention in long answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .eval_options import BackboneOptions, SeedOption, parse_task_options, run_provenance
from .knob_settings import toml_value
from .known_methods import known_methods
from .loading import load_engine
from .options import JsonFlag, with_options
from .screen import note, print_json, show_table

if TYPE_CHECKING:
    from ..evaluation.generation_columns import Column


@with_options(backbone=BackboneOptions(page_size=32))
def generation(
    backbone: BackboneOptions,
    out: Annotated[Path, typer.Option(help="Folder for the rows; a stopped run goes on there.")],
    method: Annotated[
        list[str],
        typer.Option("--method", help="METHOD[,knob=value,…], options of RetroConfig too; may be repeated. "
                     "Full attention is always there.", show_default="full, quest, its revisions, retrolm"),
    ] = [],  # noqa: B006
    task: Annotated[str, typer.Option(help="Task with long answers.")] = "longgen/register",
    task_option: Annotated[
        list[str], typer.Option("--task-option", help="Option of the task, as key=value; may be repeated.")
    ] = [],  # noqa: B006
    length: Annotated[int, typer.Option(help="Tokens of prompt and answer.", min=2)] = 10240,
    num_tokens: Annotated[int, typer.Option(help="Tokens that every method generates.", min=2)] = 2048,
    budget_share: Annotated[float, typer.Option(help="kv_budget as a share of the prompt, in whole pages.")] = 0.125,
    num_seeds: Annotated[int, typer.Option(help="Samples, each of a seed of its own, side by side.", min=1)] = 2,
    seed: SeedOption = 42,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Measure methods on one long answer: teacher forcing on full attention's own, and answering freely.

    Each step feeds the forced and the free copies of all samples. Rows are written as each method finishes.
    """
    from ..engine.whole_folder import require_folder

    require_folder(out)
    columns = parse_columns(method)
    engine = backbone.engine(kv_budget=max(2048, 3 * backbone.tokens_per_page))
    engine.check()
    from ..evaluation.generation_columns import ColumnOpener
    from ..evaluation.long_generation import LongGeneration, budget_of, generation_set
    from ..evaluation.runner import tasks_with

    if len(backbone.retriever) > 1:
        raise UserError("--retriever is given more than once. Give one, and run again for another.")
    (chosen,) = tasks_with([task], parse_task_options(task_option))
    lm = load_engine(engine)
    part = generation_set(chosen, lm.tokenizer, length, range(seed, seed + num_seeds), num_tokens)
    kv_budget = budget_of(lm, list(part.samples.values()), budget_share, backbone.tokens_per_page)
    note(f"{task} · {num_seeds} samples of {length} tokens · budget {kv_budget}")
    opener = ColumnOpener(lm, backbone.label, engine.config(), kv_budget, backbone.retriever[0])
    rows = LongGeneration(opener, part, out, run_provenance(), _show).run(columns)
    if as_json:
        print_json(rows)
        return
    columns_shown = ("method", "seed", "agreement", "perplexity", "exposure", "score", "ms/token")
    show_table(columns_shown, [_cells(row) for row in rows], title=f"{task} · {num_tokens} tokens", right=range(1, 7))


def parse_columns(texts: list[str]) -> list[Column]:
    """Columns from METHOD[,key=value,…], full attention first; raises `UserError`."""
    from ..evaluation.generation_columns import DEFAULT_COLUMNS, column_of, with_full_first

    known_methods()
    found = []
    for text in texts or DEFAULT_COLUMNS:
        name, *pairs = text.split(",")
        settings = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise UserError(f"--method needs METHOD,key=value, got {text!r}. For example: quest_retro,window=4")
            settings[key.strip()] = toml_value(value.strip())
        found.append(column_of(name, settings))
    return with_full_first(found)


def _show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        note(" · ".join(_cells(row)))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["column"],
        str(row["seed"]),
        f"{row['agreement']:.4f}",
        f"{row['perplexity']:.3f}",
        f"{row['exposure']:.2f}",
        f"{row['score']:.2f}",
        f"{1000 * row['tpot_s']:.1f}",
    )
