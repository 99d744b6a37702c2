"""`--set METHOD.knob=value`: settings of methods, told apart from those of the engine."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from .known_methods import known_methods


def plain_settings(pairs: Sequence[str]) -> list[str]:
    """The settings of the engine (key=value) among all."""
    return [pair for pair in pairs if "." not in pair.partition("=")[0]]


def split_knobs(pairs: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Part settings of the engine (key=value) from knobs of methods (METHOD.knob=value).

    Returns:
        The former as they are, and the latter as {method: {knob: value}}, with values as TOML reads them.

    Raises `UserError` for an unknown method or a knob given twice.
    """
    plain = plain_settings(pairs)
    knobs: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        if pair in plain:
            continue
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set needs METHOD.knob=value, got {pair!r}. For example: --set quest.page=32")
        method, _, knob = key.strip().partition(".")
        known_methods().get(method)
        if knob in knobs.setdefault(method, {}):
            raise UserError(f"--set {key} is given twice. Give it once.")
        knobs[method][knob] = toml_value(value.strip())
    return plain, knobs


def toml_value(text: str) -> Any:
    """A value as TOML reads it, none as None; what is no TOML value is text."""
    try:
        return None if text.lower() == "none" else tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
