"""Knobs of a method: a frozen dataclass, built from options that are refused rather than ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from ..config import check_choices
from ..errors import UserError, unknown


@dataclass(frozen=True)
class NoKnobs:
    """For methods without settings of their own."""


def build_knobs(method: str, kind: type[Any], options: Mapping[str, Any]) -> Any:
    """An instance of the knob class `kind` of `method`.

    Raises:
        UserError: an unknown knob (with the closest one), or a value of another type or outside the choices.
    """
    hints = get_type_hints(kind)
    allowed = [field.name for field in dataclasses.fields(kind)]
    for key, value in options.items():
        if not allowed:
            raise UserError(f"Method {method!r} has no knobs, got {key!r}. Leave it out.")
        if key not in allowed:
            raise unknown(f"knob of method {method!r}:", key, allowed)
        if not _fits(value, hints[key]):
            raise UserError(f"{method}.{key}={value!r} must be {_words(hints[key])}.")
    knobs = kind(**options)
    check_choices(knobs)
    return knobs


def positive(method: str, knobs: Any, *names: str) -> None:
    """Raise `UserError` unless the knobs of these names are None or at least 1."""
    for name in names:
        value = getattr(knobs, name)
        if value is not None and value < 1:
            raise UserError(f"{method}.{name} must be at least 1, got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a plain type; choices (`Literal`) are checked by `check_choices`."""
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    if not kinds:
        return True
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, tuple(kinds)) or (float in kinds and isinstance(value, int))


def _words(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    kinds = [kind for kind in (hint, *get_args(hint)) if kind in words]
    return " or ".join(words[kind] for kind in kinds)
