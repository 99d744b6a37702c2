"""`--set key=value`: text into values of `RetroConfig`'s fields, by their types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from ..config import RetroConfig
from ..errors import UserError, unknown

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn ["key=value", …] into options; raises `UserError` for an unknown key, a wrong type or a key given twice."""
    hints = get_type_hints(RetroConfig)
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UserError(f"--set needs key=value, got {pair!r}. For example: --set retrieve_every=32")
        if key not in hints:
            raise unknown("option", key, hints)
        if key in found:
            raise UserError(f"--set {key} is given twice. Give it once.")
        found[key] = _parse(key, text.strip(), hints[key])
    return found


def _parse(key: str, text: str, hint: Any) -> Any:
    kinds = {hint, *get_args(hint)}
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds:
        return _boolean(key, text)
    if int in kinds or any(type(kind) is int for kind in kinds):  # a number, or one of some numbers
        return _whole(key, text)
    if float in kinds:
        return _number(key, text)
    return text


def _boolean(key: str, text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise UserError(f"{key} must be true or false, got {text!r}.")
    return _BOOLEANS[text.lower()]


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{key} must be a number, got {text!r}.") from None


def _whole(key: str, text: str) -> int:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise UserError(f"{key} must be a whole number, got {text!r}.") from None
