"""Sentences that run over the border of two texts, for both of them.

What a question asks for often stands in one sentence. A page border in its midst leaves the words that tell where it is
on one page and the answer on the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from .word_index import WORD

_END = re.compile(r"[.!?…][\"'”\u2019)\]]*(?=\s|$)|[。\uff01\uff1f\n]")
_MOST_WORDS = 32  # where no sentence ends, as in code and tables, pages must not be counted over and over


def with_cut_sentences(texts: Sequence[str]) -> list[str]:
    """Each text with the rest of the sentences that its borders cut, at most 32 words at either end.

    Args:
        texts: what follows one another in a longer text, cut anywhere.
    """
    before, after = [""] * len(texts), [""] * len(texts)
    for i, (text, then) in enumerate(pairwise(texts)):
        tail = _tail(text, then)
        if tail.strip():
            after[i], before[i + 1] = _head(then), tail
    return [a + text + b for a, text, b in zip(before, texts, after, strict=True)]


def _tail(text: str, then: str) -> str:
    """The beginning of the last sentence, whose rest stands in `then`; blank if it has none there."""
    found = _END.finditer(text + then[:2])  # two more characters tell 4.5 from an end
    ends = [end.end() for end in found if end.start() <= len(text)]  # its mark alone may stand in `then`
    rest = text[max(ends, default=0) :]
    words = [word.start() for word in WORD.finditer(rest)]
    return rest[words[-_MOST_WORDS] :] if len(words) > _MOST_WORDS else rest


def _head(text: str) -> str:
    """The rest of the first sentence."""
    end = _END.search(text)
    head = text[: end.end()] if end else text
    words = [word.end() for word in WORD.finditer(head)]
    return head[: words[_MOST_WORDS - 1]] if len(words) > _MOST_WORDS else head
