"""`retrolm adapter`: look at LoRA adapters of stage 2, pack them smaller, share them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import JsonFlag
from .screen import print_json, show_values, size

PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="Folder of an adapter, or the name of a shipped one.")
]

command = typer.Typer(help="Look at LoRA adapters of stage 2, pack them smaller, share them.")


@command.callback()
def _group() -> None:
    """Look at LoRA adapters of stage 2, pack them smaller, share them."""


@command.command("info")
def info(path: PathArgument, as_json: JsonFlag = False) -> None:
    """Show what an adapter is, what it was trained on and how well it did."""
    from ..engine.adapter import describe_adapter
    from ..engine.shipped_adapters import resolve_adapter

    found = describe_adapter(resolve_adapter(path))
    if as_json:
        print_json(found)
        return
    show_values({**found, "weights_bytes": size(found["weights_bytes"])})


@command.command("export")
def export(
    path: PathArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    bits: Annotated[int, typer.Option("--bits", help="Bits per weight: 8, 16 (PEFT reads it) or 32.")] = 8,
    as_json: JsonFlag = False,
) -> None:
    """Write an adapter anew with other bits per weight, to share or ship it, or for PEFT to read."""
    from ..engine.adapter import describe_adapter, export_adapter
    from ..engine.shipped_adapters import resolve_adapter
    from .retriever import show_export

    source = resolve_adapter(path)
    folder = export_adapter(source, out, bits)
    before, after = (describe_adapter(place)["weights_bytes"] for place in (source, folder))
    show_export(folder, bits, before, after, as_json)


@command.command("push")
def push(
    path: PathArgument,
    repository: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME", help="Model repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be uploaded.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Upload an adapter to the Hugging Face hub, with its card as the repository's page."""
    from ..engine.push import push_adapter
    from ..engine.shipped_adapters import resolve_adapter
    from .retriever import show_push

    show_push(push_adapter(resolve_adapter(path), repository, private=private, dry_run=dry_run), dry_run, as_json)
