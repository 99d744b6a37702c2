"""Arguments and options of the `retrolm kb` commands."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import UserError

BaseArgument = Annotated[str, typer.Argument(metavar="BASE", help="Folder of the knowledge base.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Where the base's model lies now, if it was moved.", show_default="as at create"),
]
DocumentsOption = Annotated[
    list[str] | None, typer.Option("--document", help="Ask this document only (name or id); may be repeated.")
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option("--where", help="Condition on metadata: field=value, also != >= <= > < ~; may be repeated."),
]
WaitOption = Annotated[float, typer.Option("--wait-s", help="Seconds to wait for another writer.", min=0.0)]
FirstLayerOption = Annotated[
    str,
    typer.Option(help="What layers without scores take of several documents: mean_key (pages by mean keys) or recent."),
]


def parse_metadata(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Turn ["key=value", …] into fields, numbers as numbers; raises `UserError` for anything else."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--meta needs key=value, got {pair!r}. For example: --meta year=1910")
        found[key.strip()] = _value(text)
    return found


def _value(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, (int, float)) and math.isfinite(found) else text
