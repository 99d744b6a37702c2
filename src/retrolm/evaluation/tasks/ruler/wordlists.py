"""English words for keys and word lists, read from the package wonderwords."""

from __future__ import annotations

import hashlib
import random
from functools import cache
from importlib import resources

from ....errors import UserError

_FILES = {"noun": "nounlist.txt", "adjective": "adjectivelist.txt", "verb": "verblist.txt"}


@cache
def words_of(kind: str) -> list[str]:
    """Sorted list of the package's nouns, adjectives or verbs; raises `UserError` if it isn't installed."""
    try:
        text = (resources.files("wonderwords") / "assets" / _FILES[kind]).read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise UserError("RULER's words need the package wonderwords: pip install 'retrolm[evaluation]'.") from error
    return sorted({line.strip() for line in text.splitlines() if line.strip()})


@cache
def all_words() -> list[str]:
    """Sorted list of all nouns, adjectives and verbs."""
    return sorted({word for kind in _FILES for word in words_of(kind)})


def compound(rng: random.Random) -> str:
    """Draw one of all adjective-noun pairs."""
    return f"{rng.choice(words_of('adjective'))}-{rng.choice(words_of('noun'))}"


def fingerprint() -> str:
    """Hash of the word lists, which differ between versions of the package."""
    return hashlib.sha256("\n".join(f"{kind}:{' '.join(words_of(kind))}" for kind in _FILES).encode()).hexdigest()[:16]
