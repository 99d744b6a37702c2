"""Keys and values of facts: more kinds than evaluation plants, each in one style per text, and look-alikes of them."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Collection, Sequence

from ...errors import UserError, unknown
from ...planting import ADJECTIVES, FIRST_NAMES, GENERATORS, LAST_NAMES, NOUNS, Fact

Maker = Callable[[random.Random], str]
WORDS = (*ADJECTIVES, *NOUNS)
# Many strings, and many that look alike.
PLENTIFUL_KINDS = ("number", "uuid", "hex", "plate", "word_pair", "person", "invented")
_CONSONANTS = "BCDFGHJKLMNPQRSTVWXZ"
_CLASSES = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


def _term(rng: random.Random, vocabulary: Sequence[str]) -> Maker:
    """Two or three words, such as `harbour-engine`, `River Stone` or `coal_major_tin`."""
    count, joint = rng.choice((2, 2, 3)), rng.choice("-- _.")
    case = rng.choice((str, str, str.title))
    return lambda r: case(joint.join(r.choice(vocabulary) for _ in range(count)))


def _code(rng: random.Random, vocabulary: Sequence[str]) -> Maker:
    """Groups of capitals and digits, such as `7K3-QX2-9ZD`."""
    groups, size = rng.randint(2, 4), rng.randint(3, 5)
    signs = _CONSONANTS + string.digits
    return lambda r: "-".join("".join(r.choice(signs) for _ in range(size)) for _ in range(groups))


def _long_number(rng: random.Random, vocabulary: Sequence[str]) -> Maker:
    """Numbers of 6 to 12 digits, all of a text equally long."""
    digits = rng.randint(6, 12)
    return lambda r: str(r.randrange(10 ** (digits - 1), 10**digits))


def _hash(rng: random.Random, vocabulary: Sequence[str]) -> Maker:
    """16 to 40 hexadecimal digits, all of a text equally many."""
    digits, head = rng.choice((16, 20, 32, 40)), rng.choice(("", "", "0x"))
    return lambda r: f"{head}{r.getrandbits(4 * digits):0{digits}x}"


def _address(rng: random.Random, vocabulary: Sequence[str]) -> Maker:
    """Four numbers, such as `10.31.7.204`."""
    return lambda r: ".".join(str(r.randrange(256)) for _ in range(4))


def _handle(rng: random.Random, vocabulary: Sequence[str]) -> Maker:
    """A name as computers write it, such as `thea.novak31`."""
    return lambda r: f"{r.choice(FIRST_NAMES)}.{r.choice(LAST_NAMES)}{r.randrange(100)}".lower()


STYLES: dict[str, Callable[[random.Random, Sequence[str]], Maker]] = {
    "term": _term,
    "code": _code,
    "long_number": _long_number,
    "hash": _hash,
    "address": _address,
    "handle": _handle,
}
KINDS = (*GENERATORS, *STYLES)


def maker(rng: random.Random, kind: str, vocabulary: Sequence[str] = WORDS) -> Maker:
    """Return what draws strings of a kind for one text; raises `UserError` for an unknown kind."""
    if kind in STYLES:
        return STYLES[kind](rng, vocabulary)
    if kind not in GENERATORS:
        raise unknown("kind of key or value", kind, KINDS)
    return GENERATORS[kind]


def draw_strings(
    rng: random.Random, make: Maker, count: int, taken: Collection[str] = (), alike: float = 0.0
) -> list[str]:
    """Draw `count` different strings, none of them in `taken`.

    Args:
        alike: probability that a string is a look-alike of an earlier one.

    Raises:
        UserError: `make` has too few different strings.
    """
    seen, drawn = set(taken), list[str]()
    for _ in range(40 * count + 400):
        if len(drawn) == count:
            return drawn
        text = make(rng)
        if drawn and rng.random() < alike:
            text = look_alike(rng, rng.choice(drawn), text)
        if text not in seen:
            seen.add(text)
            drawn.append(text)
    raise UserError(f"There are too few different strings like {make(rng)!r} for {count} facts. Use fewer facts.")


def look_alike(rng: random.Random, text: str, other: str) -> str:
    """Return `text` with one part taken from another string of its kind, or else with one character changed."""
    parts, others = (re.split(r"([^A-Za-z0-9]+)", string) for string in (text, other))
    if len(parts) == len(others) > 1:
        place = 2 * rng.randrange((len(parts) + 1) // 2)
        return "".join([*parts[:place], others[place], *parts[place + 1 :]])
    place = rng.randrange(len(text))
    signs = next((signs for signs in _CLASSES if text[place] in signs), text[place])
    return text[:place] + rng.choice(signs) + text[place + 1 :]


def draw_facts(
    rng: random.Random,
    count: int,
    keys: Maker,
    values: Maker,
    values_per_key: int = 1,
    alike: float = 0.0,
    taken: Collection[str] = (),
) -> list[Fact]:
    """Draw `count` facts whose keys and values all differ, with keys that are look-alikes with probability `alike`."""
    names = draw_strings(rng, keys, count, taken, alike)
    found = draw_strings(rng, values, count * values_per_key, {*taken, *names})
    step = values_per_key
    return [Fact(name, tuple(found[i * step : (i + 1) * step])) for i, name in enumerate(names)]
