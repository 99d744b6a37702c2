"""Visible bookmarks (D1 a): which work can be done with them, and the refusal of what can't."""

from __future__ import annotations

from ..config import RetroConfig
from ..errors import UserError
from ..methods import Method


def require_bookmarks(config: RetroConfig, method: Method) -> None:
    """Raise `UserError` if bookmarks are to be visible and `method` encodes none."""
    if config.page_marks and not method.needs_bookmarks:
        raise UserError(
            f"Method {method.name!r} encodes no bookmarks that could be visible. Use method 'retrolm', or "
            "bookmarks='invisible'."
        )


def require_invisible(config: RetroConfig, what: str) -> None:
    """Raise `UserError` if bookmarks are visible; `what` names the work that knows only the other reading."""
    if config.page_marks:
        raise UserError(f"{what} works with invisible bookmarks alone. Leave out bookmarks='visible'.")
