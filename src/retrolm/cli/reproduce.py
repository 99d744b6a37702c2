"""`retrolm reproduce`: the paper's tables with a small model, end to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .eval_answerer import AnswererOptions, RayOption, ShardsOption, bare_tokenizer, open_answerer
from .eval_options import BackboneOptions, parse_task_options
from .known_methods import known_methods
from .pull import fetch_if_missing
from .screen import note


def command(
    preset: Annotated[Path, typer.Argument(metavar="PRESET", help="Which tables (configs/reproduce/*.toml).")],
    out: Annotated[Path, typer.Option(help="Folder for rows and reports; a stopped run goes on there.")],
    data_dir: Annotated[
        str | None, typer.Option(help="Folder with data sets, or hub; what is missing is named.", show_default="none")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model.", show_default="the preset's")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples per task and length.", min=1, show_default="the preset's")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder of a stage-2 adapter, for its rows in the tables.", show_default="none")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder that keeps generated samples.")] = None,
    task_option: Annotated[
        list[str], typer.Option("--task-option", help="Option of tasks, as key=value; may be repeated.")
    ] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="Arithmetic of the model: auto, float32, bfloat16, float16.")] = "auto",
    ray: RayOption = None,
    shards: ShardsOption = None,
) -> int:
    """Run the small-model version of the paper's tables, by the paper's rule, and write a report for each.

    Exits with 1 if a sample broke (it is recorded and scored 0).
    """
    from ..evaluation.reproduce import ROWS, load_preset, prepare, run_tables
    from ..evaluation.runner import DataOptions, check_folder
    from .eval_events import EvalScreen

    known_methods()
    plan = load_preset(preset)
    plan = dataclasses.replace(plan, model=model or plan.model)
    plan = plan if samples is None else plan.with_samples(samples)
    fetch_if_missing(plan.model)
    backbone = BackboneOptions(model=plan.model, page_size=plan.page_size, dtype=dtype)
    paper = ["agreement_layers=0"]  # each layer its own pages, found by bookmarks alone
    engine = backbone.engine(kv_budget=plan.largest_budget, chunk_pages=plan.chunk_pages, settings=paper)
    engine.check()
    check_folder(out / ROWS)
    data = DataOptions(None, plan.seed, data_dir, cache_dir, parse_task_options(task_option))
    tables, not_run = prepare(plan, bare_tokenizer(plan.model), data, adapter)
    for line in not_run:
        note(f"not run: {line}")
    with (
        open_answerer(AnswererOptions(engine, backbone.label), ray, shards) as answerer,
        EvalScreen(sum(table.num_cells for table in tables)) as events,
    ):
        cells = run_tables(plan, tables, not_run, answerer, out, events)
    print(out / "README.md")
    return 1 if any(cell["num_failed"] for cell in cells) else 0
