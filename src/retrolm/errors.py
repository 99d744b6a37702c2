"""Errors a user can act on.

Every message says what was wrong, what was allowed and how to fix it. The command line prints the message alone and
exits with `exit_code`; Python callers catch `RetroLMError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RetroLMError(Exception):
    """Base of all errors raised on purpose by RetroLM."""

    exit_code = 1


class UserError(RetroLMError, ValueError):
    """The request itself can't be carried out: a wrong option, file, model or budget."""

    exit_code = 2


class UnsupportedModelError(UserError):
    """The model is of a family, RoPE type or layout that RetroLM can't attach to."""


class IncompatibleRetrieverError(UserError):
    """A page retriever was trained for another backbone than the one it is loaded on."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Return a sentence that lists the allowed names and the closest one, for use in error messages."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Allowed: {', '.join(names)}."


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """Build the error for an unknown name of some kind (method, task, option, model)."""
    return UserError(f"Unknown {kind} {name!r}.{suggest(name, allowed)}")
