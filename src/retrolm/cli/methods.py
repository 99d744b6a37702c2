"""`retrolm methods`: the page-selection methods."""

from __future__ import annotations

from .options import JsonFlag
from .screen import print_json, show_table


def command(as_json: JsonFlag = False) -> None:
    """List the page-selection methods that --method takes."""
    from ..methods import METHODS

    found = [METHODS.get(name) for name in METHODS]
    if as_json:
        keys = ("name", "summary", "paper", "needs_bookmarks")
        print_json([{key: getattr(method, key) for key in keys} for method in found])
        return
    show_table(("method", "how it chooses pages", "paper"), [(m.name, m.summary, m.paper) for m in found])
