"""Reading recipes: TOML files whose tables become frozen dataclasses; unknown keys and wrong types are refused."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ..errors import UserError, unknown

Table = TypeVar("Table")

_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}


def read_tables(path: Path, *tables: str) -> dict[str, Any]:
    """The content of a TOML file that has these tables; raises `UserError` for what can't be read or is missing."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"Can't read the recipe {path}: {error}.") from None
    for table in tables:
        if not isinstance(content.get(table), dict):
            raise UserError(f"The recipe {path} has no [{table}] table.")
    return content


def build_table(kind: type[Table], values: Mapping[str, Any], what: str) -> Table:
    """Build a dataclass from the keys of a table; raises `UserError` for an unknown key, calling it a `what`."""
    allowed = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in allowed:
            raise unknown(what, key, allowed)
    return kind(**values)


def model_name(model: str) -> str:
    """How cards call a model: a folder by its last part, anything else as it is."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model


def check_types(config: Any) -> None:
    """Refuse values of a wrong type, such as a quoted number; raises `UserError`."""
    for name, hint in get_type_hints(type(config)).items():
        kinds, wanted = _KINDS.get(hint, ((str,), "a text"))
        value = getattr(config, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
            raise UserError(f"{name} must be {wanted}, got {value!r}.")
