"""Reading recipes: TOML files whose tables become frozen dataclasses; unknown keys and wrong types are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..errors import UserError, unknown

Table = TypeVar("Table")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(fits, value.values()))


# Type of a field -> what its values must be, and how that is said.
_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (_is_whole, "a whole number"),
    int | None: (lambda value: value is None or _is_whole(value), "a whole number"),
    float: (_is_number, "a number"),
    str: (_is_text, "a text"),
    tuple[str, ...]: (lambda value: isinstance(value, tuple) and all(map(_is_text, value)), "a list of texts"),
    Mapping[str, int]: (_is_table_of(_is_whole), "a table of whole numbers"),
    Mapping[str, float]: (
        _is_table_of(lambda value: _is_number(value) and math.isfinite(value)),
        "a table of finite numbers",
    ),
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
    check_keys(kind, values, what)
    return kind(**values)


def check_keys(kind: type[Any], values: Collection[str], what: str) -> None:
    """Refuse keys that are no fields of a dataclass; raises `UserError` with the closest one, calling it a `what`."""
    allowed = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in allowed:
            raise unknown(what, key, allowed)


def model_name(model: str) -> str:
    """How cards call a model: a folder by its last part, anything else as it is."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model


def check_types(config: Any) -> None:
    """Refuse values of a wrong type, such as a quoted number; raises `UserError`."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            hint = type(get_args(hint)[0])
        if hint not in _KINDS:  # tables of their own
            continue
        fits, wanted = _KINDS[hint]
        value = getattr(config, name)
        if not fits(value):
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
