"""`retrolm models`: the demo models and which of them are here."""

from __future__ import annotations

from .options import JsonFlag
from .screen import count, note, print_json, show_table, size


def command(as_json: JsonFlag = False) -> None:
    """List the demo models that `retrolm pull` can fetch, and which of them are here.

    Any Hugging Face id or local folder of a supported family works as --model, too.
    """
    from ..engine.catalogue import CATALOGUE
    from ..engine.pull import is_pulled, model_folder

    entries = list(CATALOGUE.values())
    if as_json:
        print_json([
            {
                "name": entry.name,
                "kind": entry.kind,
                "description": entry.description,
                "upstream": entry.upstream,
                "window": entry.window,
                "chat": entry.chat,
                "download_bytes": entry.download_bytes,
                "licence": entry.licence,
                "licence_note": entry.licence_note,
                "pulled": is_pulled(entry.name),
                "folder": str(model_folder(entry.name)) if is_pulled(entry.name) else None,
            }
            for entry in entries
        ])  # fmt: skip
        return
    rows = [
        (
            entry.name,
            "yes" if is_pulled(entry.name) else "no",
            size(entry.download_bytes),
            count(entry.window),
            entry.licence,
            entry.description,
        )
        for entry in entries
    ]
    show_table(("name", "here", "download", "window", "licence", "what it is"), rows, right=(2, 3))
    note("\nFetch one: retrolm pull NAME. A Hugging Face id or a folder works as --model, too.")
