"""Where sentences begin, in characters and in tokens."""

from __future__ import annotations

import re
from itertools import pairwise

from .sample import Span

_BOUNDARY = re.compile(r"""[.!?][\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]?[A-Z0-9])|\n\s*\n\s*""")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Rev|Capt|Col|Gen|Jr|Sr|No|vs|etc|[A-Z]))\.\s+$")


def sentence_starts(text: str) -> list[int]:
    """Return the character offsets at which sentences begin; the first is 0. Common abbreviations don't end one."""
    ends = [m.end() for m in _BOUNDARY.finditer(text) if not _ABBREVIATION.search(text, max(0, m.end() - 12), m.end())]
    return [0, *(end for end in ends if 0 < end < len(text))]


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, stripped."""
    starts = [*sentence_starts(text), len(text)]
    pieces = (text[start:end].strip() for start, end in pairwise(starts))
    return [piece for piece in pieces if piece]


def token_starts(starts: list[int], token_spans: list[Span]) -> list[int]:
    """Map ascending character offsets to the first token that ends behind each; offsets behind the last are dropped."""
    tokens: list[int] = []
    token = 0
    for start in starts:
        while token < len(token_spans) and token_spans[token][1] <= start:
            token += 1
        if token < len(token_spans) and (not tokens or tokens[-1] != token):
            tokens.append(token)
    return tokens


def token_span(start: int, end: int, token_spans: list[Span]) -> Span:
    """Return the tokens (first, last + 1) that touch the characters start..end; (-1, -1) if there are none."""
    touching = [i for i, (low, high) in enumerate(token_spans) if high > start and low < end]
    return (touching[0], touching[-1] + 1) if touching else (-1, -1)
