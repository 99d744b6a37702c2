"""`retrolm eval`: run benchmark tasks, measure page recall, score other people's predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .boundary import guard
from .eval_answerer import (
    AnswererOptions,
    RayOption,
    ShardsOption,
    bare_tokenizer,
    open_answerer,
)
from .eval_attention import attention
from .eval_generation import generation
from .eval_loss import loss
from .eval_options import AdapterOption, BackboneOptions, BudgetOption, SetOption, SetOptions, parse_budgets
from .eval_retrieval import retrieval
from .eval_score import score
from .knob_settings import split_knobs
from .known_methods import known_methods
from .options import with_options

command = typer.Typer(invoke_without_command=True)


def unless_subcommand(function: Callable[..., int]) -> Callable[..., None]:
    """Run a group's own command only where none of its subcommands is called."""
    guarded = guard(function)

    @functools.wraps(function)
    def callback(context: typer.Context, **options: Any) -> None:
        if context.invoked_subcommand is None:
            guarded(context=context, **options)

    return callback


@command.callback()
@unless_subcommand
@with_options(sets=SetOptions(), backbone=BackboneOptions())
def evaluate(
    context: typer.Context,
    sets: SetOptions,
    backbone: BackboneOptions,
    out: Annotated[Path | None, typer.Option(help="Folder for the rows; a stopped run goes on there.")] = None,
    method: Annotated[
        list[str], typer.Option("--method", help="How the budget is spent (see `retrolm methods`); may be repeated.")
    ] = ["retrolm"],  # noqa: B006
    kv_budget: BudgetOption = ["2048"],  # noqa: B006
    batch_size: Annotated[int, typer.Option(help="Samples read and answered side by side.", min=1)] = 1,
    chunk_pages: Annotated[
        int, typer.Option(help="Pages encoded at once, over all samples of a batch. 0 = what suits.")
    ] = 0,
    adapter: AdapterOption = ["none"],  # noqa: B006
    settings: SetOption = [],  # noqa: B006
    keep_pages: Annotated[bool, typer.Option("--keep-pages", help="Keep the pages used in the sample rows.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Answer failed samples again.")] = False,
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Only make the samples (--cache-dir).")] = False,
    ray: RayOption = None,
    shards: ShardsOption = None,
) -> int:
    """Run benchmark tasks × lengths × methods × budgets; one row per sample and cell, resumable after a kill.

    Exits with 1 if a sample broke (it is recorded and scored 0).
    """
    sets.check()
    if out is None and not prepare_only:
        raise UserError("Name a folder for the rows with --out.")
    plain, knobs = split_knobs(settings)
    budgets = parse_budgets(kv_budget)
    engine = backbone.engine(kv_budget=max(budgets), chunk_pages=chunk_pages, settings=plain)
    for budget in budgets:
        engine.config().replace(kv_budget=budget)
    if prepare_only:
        sets.make(bare_tokenizer(backbone.model))
        return 0
    from ..evaluation.adapters import with_adapters
    from ..evaluation.runner import Runner, check_folder
    from ..evaluation.variants import variants_of
    from .eval_events import EvalScreen, cell_line

    known_methods()
    variants = with_adapters(variants_of(method, budgets, backbone.retriever), adapter)
    options = AnswererOptions(engine, backbone.label, keep_pages, knobs)
    with open_answerer(options, ray, shards) as answerer:
        for variant in variants:
            answerer.facts(variant)  # what can't be opened is refused before any work is done
        assert out is not None
        check_folder(out)
        made = sets.make(bare_tokenizer(backbone.model))
        with EvalScreen(len(made) * len(variants)) as events:
            runner = Runner(
                answerer, out, seed=sets.seed, batch_size=batch_size, retry_failed=retry_failed, events=events
            )
            cells = runner.run(made, variants)
    for cell in cells:
        print(cell_line(cell))
    return 1 if any(cell["num_failed"] for cell in cells) else 0


command.command("attention")(attention)
command.command("generation")(generation)
command.command("loss")(loss)
command.command("retrieval")(retrieval)
command.command("score")(score)
