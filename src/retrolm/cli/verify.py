"""`retrolm verify`: show that RetroLM equals the stock model where it should."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .loading import load_engine, read_source, require_pages
from .options import EngineOptions, JsonFlag, with_engine_options
from .screen import OUT, print_json, show_table, waiting

if TYPE_CHECKING:
    from ..engine.verify import Verification


@with_engine_options(dtype="float32", max_new_tokens=16)
def command(
    engine: EngineOptions,
    file: Annotated[str | None, typer.Option(help="Text to compare on.", show_default="RetroLM's own source")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it to compare on.", min=1)] = 999,
    as_json: JsonFlag = False,
) -> int:
    """Compare RetroLM with the stock model: logits and greedy tokens at a budget that holds the text, and page by page
    against chunks at a small budget.

    The bar is 1e-4 or, if larger, three times the stock model's own difference between SDPA and eager attention in the
    same run. Exits with 1 if a comparison fails.
    """
    engine.check()
    require_pages(engine, "verify")
    text = None if file is None else read_source(file)
    lm = load_engine(engine)
    from ..engine.verify import own_source_ids, text_ids, verify

    ids = own_source_ids(lm, tokens) if text is None else text_ids(lm, text, tokens)
    with waiting("Comparing …"):
        found = verify(lm, ids, engine.max_new_tokens)
    if as_json:
        print_json({"model": engine.model, "passed": found.passed, **asdict(found)})
    else:
        show_verification(found)
    return 0 if found.passed else 1


def show_verification(found: Verification) -> None:
    """Print all comparisons."""
    rows = [
        (check.name, "-" if check.largest is None else f"{check.largest:.1e}", "ok" if check.passed else "FAILED")
        for check in found.checks
    ]
    title = f"{found.num_tokens} tokens, {found.num_generated} generated, {found.dtype}"
    show_table(("comparison", "largest logit difference", ""), rows, title=title, right=(1,))
    OUT.print(
        f"\nStock model's own difference, SDPA to eager: {found.stock_difference:.1e} · bar: {found.bar:.1e} · "
        f"budgets: {found.kv_budget} and {found.small_budget} tokens"
    )
    OUT.print("RetroLM equals the stock model." if found.passed else "RetroLM does NOT equal the stock model.")
