"""`retrolm retriever`: look at trained page retrievers, pack them smaller, share them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonFlag
from .screen import print_json, show_values, size

if TYPE_CHECKING:
    from ..engine.push import PushPlan

PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="Folder of a retriever, or the name of a shipped one.")
]

command = typer.Typer(help="Look at trained page retrievers, pack them smaller, share them.")


@command.callback()
def _group() -> None:
    """Look at trained page retrievers, pack them smaller, share them."""


@command.command("info")
def info(
    path: PathArgument,
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
    show_values(found)


@command.command("export")
def export(
    path: PathArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    bits: Annotated[int, typer.Option("--bits", help="Bits per weight: 8, 16 or 32.")] = 8,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Reduce the matrices to this rank.", show_default="as trained")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a retriever anew with fewer bits per weight or of lower rank, to share or ship it."""
    from ..engine.shipped import resolve_retriever
    from ..retriever import WEIGHTS_FILE, export_retriever

    source = resolve_retriever(path)
    folder = export_retriever(source, out, bits, rank)
    before, after = ((place / WEIGHTS_FILE).stat().st_size for place in (source, folder))
    show_export(folder, bits, before, after, as_json)


@command.command("push")
def push(
    path: PathArgument,
    repository: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME", help="Model repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be uploaded.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Upload a retriever to the Hugging Face hub, with its card as the repository's page."""
    from ..engine.push import push_retriever
    from ..engine.shipped import resolve_retriever

    show_push(push_retriever(resolve_retriever(path), repository, private=private, dry_run=dry_run), dry_run, as_json)


def show_export(folder: Path, bits: int, before: int, after: int, as_json: bool) -> None:
    """Say where the smaller copy is and how many bytes of weights it has."""
    if as_json:
        print_json({"folder": str(folder), "bits": bits, "bytes": after, "bytes_before": before})
        return
    print(f"{folder}: {size(after)} with {bits} bits per weight (before: {size(before)})")


def show_push(plan: PushPlan, dry_run: bool, as_json: bool) -> None:
    """Say what was uploaded, or would be."""
    if as_json:
        print_json({"repository": plan.repo_id, "files": plan.files, "uploaded": not dry_run})
        return
    for name, num_bytes in plan.files.items():
        print(f"{name}: {size(num_bytes)}")
    print(f"{'Would go' if dry_run else 'Uploaded'} to https://huggingface.co/{plan.repo_id}")
