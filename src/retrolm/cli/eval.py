"""`retrolm eval`: run benchmark tasks, measure page recall, score other people's predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .boundary import guard
from .eval_options import (
    CacheOption,
    DataOption,
    DtypeOption,
    LengthsOption,
    ModelOption,
    PageSizeOption,
    RetrieverOption,
    SamplesOption,
    SeedOption,
    SetOption,
    TaskOption,
    TaskSettings,
    make_sets,
    model_label,
    parse_lengths,
    parse_task_options,
    run_provenance,
)
from .eval_retrieval import retrieval
from .eval_score import score
from .loading import load_engine
from .options import DEFAULT_MODEL, EngineOptions

command = typer.Typer(invoke_without_command=True)


def unless_subcommand(function: Callable[..., int]) -> Callable[..., None]:
    """Run a group's own command only where none of its subcommands is called."""
    guarded = guard(function)

    @functools.wraps(function)
    def callback(context: typer.Context, **options: Any) -> None:
        if context.invoked_subcommand is None:
            guarded(context, **options)

    return callback


@command.callback()
@unless_subcommand
def evaluate(
    context: typer.Context,
    task: TaskOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder for the rows; a stopped run goes on there.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    method: Annotated[
        list[str], typer.Option("--method", help="full (dense attention) or a page method; may be repeated.")
    ] = ["retrolm"],  # noqa: B006
    retriever: RetrieverOption = ["auto"],  # noqa: B006
    kv_budget: Annotated[list[int], typer.Option("--kv-budget", help="Tokens per layer; may be repeated.")] = [2048],  # noqa: B006
    lengths: LengthsOption = "natural",
    num_samples: SamplesOption = None,
    seed: SeedOption = 42,
    data_dir: DataOption = None,
    task_option: TaskSettings = [],  # noqa: B006
    cache_dir: CacheOption = None,
    batch_size: Annotated[int, typer.Option(help="Samples read and answered side by side.", min=1)] = 1,
    page_size: PageSizeOption = 128,
    chunk_pages: Annotated[int, typer.Option(help="Pages encoded at once, over all samples of a batch.")] = 16,
    dtype: DtypeOption = "auto",
    settings: SetOption = [],  # noqa: B006
    keep_pages: Annotated[bool, typer.Option("--keep-pages", help="Keep the pages used in the sample rows.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Answer failed samples again.")] = False,
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Only make the samples (--cache-dir).")] = False,
) -> int:
    """Run benchmark tasks × lengths × methods × budgets; one row per sample and cell, resumable after a kill.

    Exits with 1 if a sample broke (it is recorded and scored 0).
    """
    _require(task, out)
    engine = EngineOptions(
        model=model,
        retriever="none",
        kv_budget=max(kv_budget),
        page_size=page_size,
        chunk_pages=chunk_pages,
        dtype=dtype,
        settings=settings,
    )
    for budget in kv_budget:
        engine.config().replace(kv_budget=budget)
    from ..evaluation.runner import DataOptions, Runner
    from ..evaluation.tasks import expand_tasks
    from ..evaluation.variants import VariantLoader, variants_of
    from .eval_events import EvalScreen, cell_line

    names, sizes, variants = expand_tasks(task), parse_lengths(lengths), variants_of(method, kv_budget, retriever)
    loader = VariantLoader(load_engine(engine), model_label(model), engine.config(), keep_pages)
    loader.check(variants)
    data = DataOptions(num_samples, seed, data_dir, cache_dir, parse_task_options(task_option))
    sets = make_sets(loader.tokenizer, names, sizes, data)
    if prepare_only:
        return 0
    with EvalScreen(len(sets) * len(variants)) as events:
        assert out is not None
        runner = Runner(
            loader, out, run_provenance(), seed=seed, batch_size=batch_size, retry_failed=retry_failed, events=events
        )
        cells = runner.run(sets, variants)
    for cell in cells:
        print(cell_line(cell))
    return 1 if any(cell["num_failed"] for cell in cells) else 0


def _require(task: list[str], out: Path | None) -> None:
    if not task:
        raise UserError("Name what to run with --task; for example: retrolm eval --task ruler-needles --out results.")
    if out is None:
        raise UserError("Name a folder for the rows with --out.")


command.command("retrieval")(retrieval)
command.command("score")(score)
