"""`retrolm methods`: all methods, what they attend and what they keep."""

from __future__ import annotations

from .known_methods import known_methods
from .options import JsonFlag
from .screen import print_json, show_table


def command(as_json: JsonFlag = False) -> None:
    """List the methods that --method takes, with what their budget is spent on and what they keep in memory."""
    methods = known_methods()
    found = [methods.get(name).describe() for name in methods]
    if as_json:
        print_json(found)
        return
    keys = ("name", "kind", "prefill", "budget_split", "keeps", "paper")
    show_table(("method", "kind", "prefill", "budget", "keeps", "paper"), [[m[key] for key in keys] for m in found])
