"""What is searched for: the question without the instructions around it."""

from __future__ import annotations

import re

_ASKED = re.compile(r"Question:[^\S\n]*(.*?)\s*(?:\n\s*Answer:?.*)?$", re.S)


def query_of(text: str) -> str:
    """What stands behind the last "Question:" and before a closing "Answer:"; all of a text that has no such mark."""
    start = text.rfind("Question:")
    found = _ASKED.match(text, start) if start >= 0 else None
    query = found.group(1).strip() if found else ""
    return query or text.strip()
