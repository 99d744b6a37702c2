"""What the commands of `retrolm train` that read a recipe have in common."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Recipe (TOML) with the tables data and train.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a key of the table train, as key=value, or of data, as data.key=value; "
                 "may be repeated.", show_default=False),
]  # fmt: skip


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn ["key=value", …] into values as TOML reads them; what is no TOML value is text. Raises `UserError`."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UserError(f"--set needs key=value, got {pair!r}. For example: --set lr=1e-3")
        if key in found:
            raise UserError(f"--set {key} is given twice. Give it once.")
        found[key] = _toml_value(text.strip())
    return found


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
