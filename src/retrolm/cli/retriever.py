"""`retrolm retriever`: look at trained page retrievers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import JsonFlag
from .screen import print_json, show_table, size

command = typer.Typer(help="Look at trained page retrievers.")


@command.callback()
def _group() -> None:
    """Look at trained page retrievers."""


@command.command("info")
def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a retriever, or the name of a shipped one.")],
    as_json: JsonFlag = False,
) -> None:
    """Show what a retriever is, what it was trained on and how well it did."""
    from ..engine.shipped import resolve_retriever
    from ..retriever import WEIGHTS_FILE, read_card

    folder = resolve_retriever(path)
    card = read_card(folder)
    weights = folder / WEIGHTS_FILE
    found: dict[str, Any] = {
        "name": card.name,
        "folder": str(folder),
        "rank": card.rank,
        "page_size": card.page_size,
        "weights_bytes": weights.stat().st_size if weights.is_file() else None,
        "backbone": card.backbone,
        "details": card.details,
    }
    if as_json:
        print_json(found)
        return
    num_bytes = found["weights_bytes"]
    found["rank"] = card.rank or "full"
    found["weights_bytes"] = "missing" if num_bytes is None else size(num_bytes)
    show_table(("", ""), list(_flat(found)))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of (dotted key, text)."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, str(value)))
    return rows
