"""`retrolm kb export` and `import`: a base as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .kb_options import BaseArgument
from .options import JsonFlag
from .screen import count, note, print_json, size, waiting


def export(
    base: BaseArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write (.tar).")],
    as_json: JsonFlag = False,
) -> None:
    """Write a base into one file, to move or share it. It holds the texts."""
    from ..knowledge_base.archive import export_base

    with waiting("Writing …"):
        num_bytes = export_base(base, file)
    if as_json:
        print_json({"file": str(file), "bytes": num_bytes})
        return
    print(f"{file}: {size(num_bytes)}")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File written by `retrolm kb export`.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="New folder for the base.")],
    as_json: JsonFlag = False,
) -> None:
    """Unpack an exported base into a new folder, once everything in it was checked."""
    from ..knowledge_base.archive import import_base

    with waiting("Checking …"):
        manifest = import_base(file, base)
    if as_json:
        print_json({"base": str(base), "num_documents": len(manifest.documents)})
        return
    print(f"{base}: {count(len(manifest.documents))} documents")
    note(f"Its model: {manifest.setup.get('model')}. Give --model if that lies elsewhere here.")
