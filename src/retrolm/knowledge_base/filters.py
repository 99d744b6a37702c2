"""Which documents a question is put to: by name, and by conditions on their metadata."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .folder import find_documents
from .manifest import DocumentEntry, Manifest

Where = Mapping[str, Any] | Sequence[str]
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
    "~": lambda found, wanted: str(wanted).lower() in str(found).lower(),
}
_CONDITION = re.compile(r"\s*([\w.-]+)\s*(!=|>=|<=|=|>|<|~)\s*(.*?)\s*", re.DOTALL)
_OWN_FIELDS = ("name", "source", "id", "added_at", "num_tokens")


@dataclass(frozen=True)
class Condition:
    """`field operator value`, for example `year >= 2019`; `~` = contains, whatever the case."""

    field: str
    operator: str
    value: Any

    def holds(self, entry: DocumentEntry) -> bool:
        """Whether a document meets it; one without the field meets only `!=`."""
        found = entry.metadata.get(self.field, getattr(entry, self.field, None) if self.field in _OWN_FIELDS else None)
        if found is None:
            return self.operator == "!="
        return _OPERATORS[self.operator](*_alike(found, self.value, self.operator))


def conditions(where: Where | None) -> list[Condition]:
    """Conditions from {"field": value, …} or ["field>=value", …]; raises `UserError` for what is neither."""
    if where is None:
        return []
    if isinstance(where, Mapping):
        return [Condition(key, "=", value) for key, value in where.items()]
    return [_parse(text) for text in ([where] if isinstance(where, str) else where)]


def choose(manifest: Manifest, names: Iterable[str] | None, where: Where | None) -> list[DocumentEntry]:
    """Documents by name and condition, in the base's order; all if neither is given.

    Raises:
        UserError: an unknown name, or no document is left.
    """
    found = list(manifest.documents) if names is None else find_documents(manifest, names)
    wanted = conditions(where)
    found = [entry for entry in found if all(condition.holds(entry) for condition in wanted)]
    if not found:
        reason = "No document meets these conditions" if manifest.documents else "The base holds no document yet"
        raise UserError(f"{reason}. See: retrolm kb list, retrolm kb add.")
    return found


def _parse(text: str) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} is no condition. Write field=value; also !=, >=, <=, >, <, and ~ for contains.")
    return Condition(*match.groups())


def _alike(found: Any, wanted: Any, symbol: str) -> tuple[Any, Any]:
    """Both as numbers if they are, else as text."""
    if symbol == "~":
        return found, wanted
    try:
        return float(found), float(wanted)
    except (TypeError, ValueError):
        return str(found), str(wanted)
