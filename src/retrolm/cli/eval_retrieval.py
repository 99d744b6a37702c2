"""`retrolm eval retrieval`: how often each page index finds the evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .eval_options import BackboneOptions, SetOptions, run_provenance
from .loading import load_engine
from .options import with_options
from .screen import count, note, show_table

if TYPE_CHECKING:
    from ..engine.model import RetroLM
    from ..retriever import PageRetriever


@with_options(sets=SetOptions(), backbone=BackboneOptions())
def retrieval(
    sets: SetOptions,
    backbone: BackboneOptions,
    out: Annotated[Path, typer.Option(help="Folder for the rows; a stopped run goes on there.")],
    index: Annotated[
        list[str],
        typer.Option("--index", help="Training-free page method to compare with; may be repeated.",
                     show_default="all of them"),
    ] = [],  # noqa: B006
    adapter: Annotated[
        str, typer.Option(help="LoRA adapter (stage 2) on the model: a folder, a shipped one, auto, or none.")
    ] = "none",
    agreement_layers: Annotated[
        int | None, typer.Option(help="Also measure what so many last layers agree on, as questions do; 0 = don't.",
                                 min=0, show_default="as retrolm does")
    ] = None,
    word_weight: Annotated[
        float | None, typer.Option(help="Also measure what they agree on when shared words count so much; 0 = don't.",
                                   min=0, show_default="as retrolm does")
    ] = None,
    heatmap: Annotated[int, typer.Option(help="Questions per set to draw as maps of layers and pages.", min=0)] = 0,
) -> None:  # fmt: skip
    """Measure page recall on dense prefill: trained retrievers, untrained bookmarks, training-free indexes, oracle."""
    from ..engine.whole_folder import require_folder

    require_folder(out)
    sets.check()
    from ..engine.shipped_adapters import adapter_for
    from ..evaluation.retrieval.run import run_recall
    from ..evaluation.retrieval.scores import page_indexes

    indexes = page_indexes(index)
    lm = load_bare(backbone, agreement_layers=agreement_layers, word_weight=word_weight)
    folder = adapter_for(lm.backbone, adapter)
    if folder is not None:
        lm.use_adapter(folder)
    name = None if lm.adapter is None else lm.adapter.card.name
    facts = {"model": backbone.label, "adapter": name, "seed": sets.seed, **run_provenance()}
    retrievers = load_retrievers(lm, backbone.retriever)
    run_recall(lm, sets.make(lm.tokenizer), retrievers, out, facts, heatmap, indexes, _show)


def load_bare(backbone: BackboneOptions, **settings_of: float | None) -> RetroLM:
    """The model for measurements on a dense pass, whose budget doesn't matter; settings that are None are left out."""
    budget = max(2048, 3 * backbone.tokens_per_page)
    settings = [f"{name}={value}" for name, value in settings_of.items() if value is not None]
    return load_engine(backbone.engine(kv_budget=budget, settings=settings))


def load_retrievers(lm: RetroLM, names: list[str]) -> dict[str, PageRetriever]:
    """Loaded retrievers by the name of their card; folders of the same name are told apart by their path.

    Raises `UserError` for one whose bookmarks were read otherwise in training than scores are taken here.
    """
    from ..engine.shipped import find_shipped, resolve_retriever
    from ..retriever import check_choices, load_retriever

    found: dict[str, PageRetriever] = {}
    for name in names:
        path = None if name == "none" else find_shipped(lm.backbone) if name == "auto" else resolve_retriever(name)
        if path is None:
            continue
        loaded = load_retriever(path, lm.backbone.projection_shapes(), lm.backbone.fingerprint()).to(lm.device).eval()
        check_choices(loaded.card, lm.config)
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
            _share(row["recall"], row.get("recall_ci")),
            f"{_share(row['best_recall'], row.get('best_recall_ci'))} (layer {row['best_layer']})",
        )
        for row in rows
    ]
    title = f"{first['task']} · {first['length'] or 'natural'} · {first['num_samples']} questions"
    show_table(("index", "pages", "recall", "best layer"), cells, title=title, right=(1, 2, 3))


def _share(value: float, ends: list[float] | None) -> str:
    return f"{value:.2f}" if ends is None else f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"
