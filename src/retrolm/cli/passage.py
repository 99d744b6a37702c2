"""Which part of a page to show: the stretch that has most to do with a question and its answer."""

from __future__ import annotations

import re

WORD = re.compile(r"\w{4,}")  # shorter words say little
LEAD = 12  # characters shown before the first word that matches


def passage(text: str, about: str, width: int) -> str:
    """Return at most `width` characters of `text` on one line: where most different words of `about` stand together."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    wanted = set(WORD.findall(about.lower()))
    found = [(match.start(), word) for match in WORD.finditer(line) if (word := match.group().lower()) in wanted]
    reach = width - LEAD - 2

    def distinct(start: int) -> int:
        return len({word for at, word in found if start <= at < start + reach})

    best = max((at for at, _ in found), key=distinct, default=0)
    return _cut(line, max(best - LEAD, 0), width)


def _cut(line: str, start: int, width: int) -> str:
    """Characters from `start` on, whole words, with an ellipsis where something is left out."""
    if start:
        start = line.find(" ", start) + 1 or start
    room = width - (2 if start else 1)
    shown = line[start : start + room]
    if start + room < len(line):
        shown = (shown.rpartition(" ")[0] or shown) + "…"
    return ("…" if start else "") + shown
