"""`retrolm eval loss`: language-model loss on held-out texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .eval_options import AdapterOption, BackboneOptions, BudgetOption, parse_budgets, run_provenance
from .loading import load_engine
from .options import JsonFlag, with_options
from .output_file import check_writable, write_whole
from .screen import note, print_json, show_table


@with_options(backbone=BackboneOptions())
def loss(
    backbone: BackboneOptions,
    file: Annotated[Path, typer.Argument(help='Held-out texts: JSON lines of {"text"} (.gz, .zst), or a text.')],
    method: Annotated[
        list[str], typer.Option("--method", help="full (dense attention) or a page method; may be repeated.")
    ] = ["retrolm", "full"],  # noqa: B006
    kv_budget: BudgetOption = ["2048"],  # noqa: B006
    adapter: AdapterOption = ["none"],  # noqa: B006
    length: Annotated[int, typer.Option(help="Tokens per piece.", min=2)] = 8192,
    num_pieces: Annotated[int, typer.Option(help="Pieces, of different documents as far as these go.", min=1)] = 16,
    chat_prefix: Annotated[
        bool, typer.Option(help="Put the chat template's head in front of each piece, as when documents are read.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Also write the rows to this file, as JSON lines.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure the loss of held-out texts under page methods, full attention and adapters, on the same pieces.

    Pages are chosen with the bookmark of the page before, so that no token sees a choice that knows what follows.
    """
    check_writable(output)
    budgets = parse_budgets(kv_budget)
    engine = backbone.engine(kv_budget=max(budgets))
    from ..evaluation.adapters import AdapterLoader, with_adapters
    from ..evaluation.text_loss import loss_set, measure_losses
    from ..evaluation.variants import variants_of

    variants = with_adapters(variants_of(method, budgets, backbone.retriever), adapter)
    lm = load_engine(engine)
    texts = loss_set(file, lm.tokenizer, length, num_pieces, chat_prefix)
    loader = AdapterLoader(lm, backbone.label, engine.config())
    loader.check(variants)
    rows = measure_losses(loader, variants, texts, run_provenance(), _show)
    if output is not None:
        write_whole(output, "".join(json.dumps(row) + "\n" for row in rows))
    if as_json:
        print_json(rows)
        return
    columns = ("method", "budget", "adapter", "loss", "95% interval")
    title = f"{texts.name} · {len(texts.pieces)} pieces of {length} tokens"
    show_table(columns, [_cells(row) for row in rows], title=title, right=(1, 3))


def _show(row: dict[str, Any]) -> None:
    stretches = ", ".join(f"{name} {value:.3f}" for name, value in row["loss_by_position"].items())
    note(f"{row['method']} · adapter {row['adapter'] or 'none'}: loss {row['loss']:.4f} ({stretches})")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["loss_ci"]
    budget = "-" if row["kv_budget"] is None else str(row["kv_budget"])
    return row["method"], budget, row["adapter"] or "none", f"{row['loss']:.4f}", f"{low:.4f} to {high:.4f}"
