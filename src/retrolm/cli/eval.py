"""`retrolm eval`: run benchmark tasks, measure page recall, score other people's predictions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .boundary import guard
from .loading import load_engine
from .options import DEFAULT_MODEL, EngineOptions
from .screen import note

if TYPE_CHECKING:
    from ..engine.model import RetroLM
    from ..evaluation.runner import DataOptions, SampleSet

command = typer.Typer(invoke_without_command=True)

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
SetOption = Annotated[list[str], typer.Option("--set", help="Any other option of RetroConfig, as key=value.")]


@command.callback()
@guard
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
    if context.invoked_subcommand is not None:
        return 0
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
    lm = load_engine(engine)
    sets = make_sets(lm, names, sizes, DataOptions(num_samples, seed, data_dir, cache_dir))
    if prepare_only:
        return 0
    loader = VariantLoader(lm, model_label(model), engine.config(), keep_pages)
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


def make_sets(lm: RetroLM, names: list[str], sizes: list[int | None], options: DataOptions) -> list[SampleSet]:
    """Make all samples before the first answer, so that missing data is known at once."""
    from ..evaluation.runner import sample_sets

    sets = []
    for part in sample_sets(lm.tokenizer, names, sizes, options):
        sets.append(part)
        note(f"{part.task.name} · {part.length or 'natural'}: {len(part.samples)} samples")
    return sets
