"""Reading recipes: TOML files whose tables become frozen dataclasses; unknown keys and wrong types are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from ..errors import UserError, unknown

Table = TypeVar("Table")

_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides code, backbone and what it reads: `train` and `data` tables.

    Attributes:
        free_options: keys of `train` that no trained number depends on; a resumed run may change them.
    """

    train: Any
    data: Any
    free_options: ClassVar[Collection[str]] = ()

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def decisive(self) -> dict[str, Any]:
        """The part that the trained numbers depend on (all but `free_options`)."""
        found = self.as_dict()
        found["train"] = {key: value for key, value in found["train"].items() if key not in self.free_options}
        return found


def read_recipe(path: Path, overrides: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The [train] and the [data] table.

    Args:
        overrides: values in place of keys of [train], or of [data] where the name begins with it
            ("data.weights.facts").

    Raises:
        UserError: unreadable file, missing table, no model, an override of a key within what is no table.
    """
    content = read_tables(path, "data", "train")
    for name, value in (overrides or {}).items():
        _override(content, name if name.startswith("data.") else f"train.{name}", value)
    if "model" not in content["train"]:
        raise UserError(f"The [train] table of {path} names no model.")
    return content["train"], content["data"]


def _override(content: dict[str, Any], name: str, value: Any) -> None:
    *tables, key = name.split(".")
    place: Any = content
    for table in tables:
        place = place.setdefault(table, {})
        if not isinstance(place, dict):
            raise UserError(f"{name!r} can't be set: {table} is no table of the recipe.")
    place[key] = value


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


def check_ranges(
    config: Any,
    *,
    at_least_one: Collection[str],
    not_negative: Collection[str],
    inside_unit: Collection[str],
    shares: Collection[str],
    positive: Collection[str],
) -> None:
    """Refuse numbers outside their range; raises `UserError`. `inside_unit` leaves 0 and 1 out, `shares` holds them."""
    checks = (
        (at_least_one, lambda value: value >= 1, "be at least 1"),
        (not_negative, lambda value: value >= 0, "not be negative"),
        (inside_unit, lambda value: 0 < value < 1, "lie between 0 and 1"),
        (shares, lambda value: 0 <= value <= 1, "be a share between 0 and 1"),
        (positive, lambda value: value > 0, "be positive"),
    )
    for names, fits, must in checks:
        for name in names:
            if not fits(getattr(config, name)):
                raise UserError(f"{name} must {must}, got {getattr(config, name)!r}.")
