"""`retrolm eval retrieval`: how often each page index finds the evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
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
    TaskOption,
    TaskSettings,
    make_sets,
    model_label,
    parse_lengths,
    parse_task_options,
    run_provenance,
)
from .loading import load_engine
from .options import DEFAULT_MODEL, EngineOptions
from .screen import count, note, show_table

if TYPE_CHECKING:
    from ..engine.model import RetroLM
    from ..retriever import PageRetriever


def retrieval(
    task: TaskOption,
    out: Annotated[Path, typer.Option(help="Folder for the rows; a stopped run goes on there.")],
    model: ModelOption = DEFAULT_MODEL,
    retriever: RetrieverOption = ["auto"],  # noqa: B006
    lengths: LengthsOption = "natural",
    num_samples: SamplesOption = None,
    seed: SeedOption = 42,
    data_dir: DataOption = None,
    task_option: TaskSettings = [],  # noqa: B006
    cache_dir: CacheOption = None,
    page_size: PageSizeOption = 128,
    dtype: DtypeOption = "auto",
    heatmap: Annotated[int, typer.Option(help="Questions per set to draw as maps of layers and pages.", min=0)] = 0,
) -> None:
    """Measure page recall on dense prefill: trained retrievers, untrained bookmarks, training-free indexes, oracle."""
    from ..evaluation.retrieval.run import run_recall
    from ..evaluation.runner import DataOptions
    from ..evaluation.tasks import expand_tasks

    names, sizes = expand_tasks(task), parse_lengths(lengths)
    engine = EngineOptions(
        model=model, retriever="none", page_size=page_size, kv_budget=max(2048, 3 * page_size), dtype=dtype
    )
    lm = load_engine(engine)
    sets = make_sets(
        lm.tokenizer, names, sizes, DataOptions(num_samples, seed, data_dir, cache_dir, parse_task_options(task_option))
    )
    facts = {"model": model_label(model), "seed": seed, **run_provenance()}
    run_recall(lm, sets, _retrievers(lm, retriever), out, facts, heatmap, _show)


def _retrievers(lm: RetroLM, names: list[str]) -> dict[str, PageRetriever]:
    """Loaded retrievers by the name of their card; folders of the same name are told apart by their path."""
    from ..engine.shipped import find_shipped, resolve_retriever
    from ..retriever import load_retriever

    found: dict[str, PageRetriever] = {}
    for name in names:
        path = None if name == "none" else find_shipped(lm.backbone) if name == "auto" else resolve_retriever(name)
        if path is None:
            continue
        loaded = load_retriever(path, lm.backbone.projection_shapes(), lm.backbone.fingerprint()).to(lm.device).eval()
        label = loaded.card.name if loaded.card.name not in found else path.name
        if label in found:
            raise UserError(f"Two retrievers are called {label!r}. Give one of them another folder name.")
        found[label] = loaded
    return found


def _show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    if not first["num_samples"]:
        note(f"{first['task']}: no question with known evidence ({first['left_out']}).")
        return
    cells = [
        (
            row["index"],
            count(row["num_pages"]),
            f"{row['recall']:.2f}",
            f"{row['best_recall']:.2f} (layer {row['best_layer']})",
        )
        for row in rows
    ]
    title = f"{first['task']} · {first['length'] or 'natural'} · {first['num_samples']} questions"
    show_table(("index", "pages", "recall", "best layer"), cells, title=title, right=(1, 2, 3))
