"""`retrolm methods`: all methods, what they attend and what they keep."""

from __future__ import annotations

from rich.text import Text

from .known_methods import known_methods
from .options import JsonFlag
from .screen import OUT, print_json

_LINES = ("summary", "budget_split", "keeps", "paper")
_LABELS = {"budget_split": "budget: ", "keeps": "keeps: "}


def command(as_json: JsonFlag = False) -> None:
    """List the methods that --method takes, with what their budget is spent on and what they keep in memory."""
    methods = known_methods()
    found = [methods.get(name).describe() for name in methods]
    if as_json:
        print_json(found)
        return
    for entry in found:
        OUT.print(Text.assemble((entry["name"], "bold"), f" · {entry['kind']} · {entry['prefill']} prefill"))
        for key in _LINES:
            OUT.print(Text(f"  {_LABELS.get(key, '')}{entry[key]}"), soft_wrap=True)
