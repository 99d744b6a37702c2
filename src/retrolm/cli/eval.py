"""`retrolm eval`: run benchmark tasks, measure page recall, score other people's predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .boundary import guard
from .eval_attention import attention
from .eval_options import BackboneOptions, SetOption, SetOptions, run_provenance
from .eval_retrieval import retrieval
from .eval_score import score
from .loading import load_engine
from .options import EngineOptions, with_options

if TYPE_CHECKING:
    from ..evaluation.answering import Answerer, LocalAnswerer

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
        list[str], typer.Option("--method", help="full (dense attention) or a page method; may be repeated.")
    ] = ["retrolm"],  # noqa: B006
    kv_budget: Annotated[list[int], typer.Option("--kv-budget", help="Tokens per layer; may be repeated.")] = [2048],  # noqa: B006
    batch_size: Annotated[int, typer.Option(help="Samples read and answered side by side.", min=1)] = 1,
    chunk_pages: Annotated[int, typer.Option(help="Pages encoded at once, over all samples of a batch.")] = 16,
    settings: SetOption = [],  # noqa: B006
    keep_pages: Annotated[bool, typer.Option("--keep-pages", help="Keep the pages used in the sample rows.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Answer failed samples again.")] = False,
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Only make the samples (--cache-dir).")] = False,
    ray: Annotated[
        str | None, typer.Option(help="Share samples out on Ray: a cluster's address, or local.", show_default="off")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(help="Models on Ray.", min=1, show_default="one per GPU, or per machine without any")
    ] = None,
) -> int:
    """Run benchmark tasks × lengths × methods × budgets; one row per sample and cell, resumable after a kill.

    Exits with 1 if a sample broke (it is recorded and scored 0).
    """
    sets.check()
    if out is None and not prepare_only:
        raise UserError("Name a folder for the rows with --out.")
    engine = backbone.engine(kv_budget=max(kv_budget), chunk_pages=chunk_pages, settings=settings)
    for budget in kv_budget:
        engine.config().replace(kv_budget=budget)
    if prepare_only:
        sets.make(_tokenizer(backbone.model))
        return 0
    from ..evaluation.runner import Runner
    from ..evaluation.variants import variants_of
    from .eval_events import EvalScreen, cell_line

    variants = variants_of(method, kv_budget, backbone.retriever)
    with open_answerer(engine, backbone, keep_pages, ray, shards) as answerer:
        for variant in variants:
            answerer.facts(variant)  # what can't be opened is refused before any work is done
        made = sets.make(_tokenizer(backbone.model))
        with EvalScreen(len(made) * len(variants)) as events:
            assert out is not None
            runner = Runner(
                answerer, out, seed=sets.seed, batch_size=batch_size, retry_failed=retry_failed, events=events
            )
            cells = runner.run(made, variants)
    for cell in cells:
        print(cell_line(cell))
    return 1 if any(cell["num_failed"] for cell in cells) else 0


def open_answerer(
    engine: EngineOptions, backbone: BackboneOptions, keep_pages: bool, ray: str | None, shards: int | None
) -> AbstractContextManager[Answerer]:
    """What answers samples: this process, or shards on Ray. Raises `UserError`."""
    provenance = run_provenance()
    if ray is None:
        if shards is not None:
            raise UserError("--shards needs --ray. For example: --ray local --shards 2.")
        return nullcontext(local_answerer(engine, backbone.label, keep_pages, provenance["command"]))
    from ..evaluation.ray_shards import RayShards

    make = functools.partial(local_answerer, engine, backbone.label, keep_pages, provenance["command"])
    return RayShards(ray, make, provenance, shards)


def local_answerer(engine: EngineOptions, label: str, keep_pages: bool, command_line: str) -> LocalAnswerer:
    """Load the model of `engine` in this process; a shard on another machine states that machine in its rows."""
    from ..evaluation.answering import LocalAnswerer
    from ..evaluation.variants import VariantLoader

    provenance = {**run_provenance(), "command": command_line}
    return LocalAnswerer(VariantLoader(load_engine(engine), label, engine.config(), keep_pages), provenance)


def _tokenizer(model: str) -> Any:
    from ..engine.quiet import silence_libraries
    from ..engine.tokenizer import load_tokenizer

    silence_libraries()
    return load_tokenizer(model)


command.command("attention")(attention)
command.command("retrieval")(retrieval)
command.command("score")(score)
