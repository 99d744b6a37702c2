"""Synthetic facts for long texts: random keys and values, and places to plant them.

Training and evaluation both plant facts in long texts, each in its own wordings; what they share stands here. All
functions draw from a `random.Random`, so a fact is a pure function of its seed.
"""

from __future__ import annotations

import datetime
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .errors import UserError, unknown

Piece = TypeVar("Piece")


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text, split at white space."""
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    """Return the phrases of a text, split at vertical bars; white space within a phrase becomes one space."""
    return tuple(" ".join(phrase.split()) for phrase in text.split("|"))


FIRST_NAMES = words(
    """
    Ada Agnes Aiko Alan Amara Anders Anika Arturo Beatrix Benedict Bianca Bruno Camille Cedric Chidi Clara
    Conrad Dalia Dmitri Edith Elias Elena Emeka Esther Farid Felix Fiona Frida Gareth Greta Hana Harold Hector
    Helga Ibrahim Imogen Ines Ingrid Isaac Jasper Joaquin Jonas Judith Kamala Katya Kenji Lars Leila Leopold
    Lionel Lucia Magnus Maren Marcus Matilda Mei Mikhail Mirela Nadia Naomi Nikolai Nora Octavia Olaf Omar Oscar
    Paloma Petra Priya Quentin Rafael Ragnhild Ravi Rosalind Rupert Sabine Samir Selma Sergei Silvia Simone
    Sofia Stellan Tamara Tariq Thea Theodore Tobias Ulrich Uma Valentina Victor Vivian Walter Wendell Xavier
    Yara Yusuf Zelda Zoran
    """
)
LAST_NAMES = words(
    """
    Abbott Adeyemi Almeida Andersson Appleby Baptiste Barlow Becker Bellamy Bergstrom Blackwood Borges Brandt
    Calloway Castellano Chandra Cheung Coleridge Dahl Delacroix Demir Drummond Eastman Eklund Ellsworth
    Fairbanks Farrow Ferreira Fitzroy Fontaine Gallagher Garrick Goldberg Grimaldi Haddad Halvorsen Hargrove
    Hawthorne Hoffman Ibsen Ingram Ivanova Jankowski Kaplan Kessler Kimura Kowalski Lachance Langford Larkin
    Lindqvist Lombardi Maddox Marchetti Mbeki Mercer Montague Moreau Nakamura Nordstrom Novak Okafor Okonkwo
    Olsen Ortega Pemberton Petrov Pickering Quigley Radcliffe Ramanathan Reinholt Rossi Rutherford Saito Salazar
    Santoro Schneider Sinclair Stavros Sterling Suzuki Tanaka Thackeray Thornton Underhill Vance Vasquez Volkov
    Wakefield Weatherby Whitlock Yamada Yilmaz Zimmerman
    """
)
CITIES = phrases(
    """
    Accra | Adelaide | Aleppo | Antwerp | Asheville | Baku | Bamako | Basel | Bergen | Bilbao | Bogota | Bologna
    | Bratislava | Brno | Bruges | Bucharest | Calgary | Cardiff | Cartagena | Chengdu | Cork | Cusco | Dakar |
    Danang | Dresden | Dundee | Durban | Edmonton | Esbjerg | Fukuoka | Galway | Gdansk | Geneva | Ghent | Graz
    | Hamburg | Hanoi | Havana | Helsinki | Hobart | Inverness | Izmir | Jaipur | Kampala | Katowice | Kigali |
    Kyoto | La Paz | Lagos | Leeds | Leipzig | Lima | Lisbon | Ljubljana | Luanda | Lyon | Malmo | Manaus |
    Marseille | Medellin | Minsk | Mombasa | Monterrey | Montreal | Muscat | Nagoya | Nantes | Naples | Odense |
    Osaka | Oulu | Palermo | Perth | Plovdiv | Porto | Pune | Quito | Reykjavik | Riga | Rosario | Rotterdam |
    Salzburg | Santiago | Sapporo | Seville | Sofia | Split | Tallinn | Tampere | Tbilisi | Thessaloniki |
    Toulouse | Trieste | Tromso | Tunis | Turin | Utrecht | Valparaiso | Verona | Vilnius | Windhoek | Wroclaw |
    Yerevan | Zagreb
    """
)
ADJECTIVES = words(
    """
    amber ancient arctic bashful blunt brazen brittle broad bronze calm careful cheerful civic clumsy coastal
    copper cosmic crimson curious damp daring dim distant dusty eager eastern emerald faint fearless fierce
    floral foggy fragile frosty gentle gilded gloomy golden graceful grand hardy hollow humble idle indigo iron
    ivory jagged jolly keen lavish lazy lively lofty lonely loyal lucid mellow mighty misty modest narrow nimble
    noble northern odd olive pale patient plain polite proud quaint quick quiet rapid restless rigid rustic
    salty scarlet secret shaded shallow silent silver slender smoky solemn southern spare spiral steady steep
    stern stout subtle sudden sunny swift tame tender thorny tidy timid tranquil twisted urban vague velvet
    vivid wandering weary western whimsical wild windy winter wise wooden yellow young zealous
    """
)
NOUNS = words(
    """
    acorn anchor anvil apron arrow atlas badger balcony banjo barrel basket beacon beetle bell bicycle blanket
    bottle bridge bucket buffalo button cabin cactus camel candle canoe canyon carpet castle cedar chapel
    chimney cistern clarinet clock clover cobbler compass coral cottage cradle crane cricket crown curtain
    dagger daisy dolphin donkey drum eagle easel elbow ember engine falcon feather fiddle flagon flint fountain
    fox garden glacier goblet granite hammer harbor harp hatchet hazel hedge helmet heron hinge island ivy
    jacket jasmine kettle kite ladder lagoon lantern lark lemon lighthouse lizard lobster locket magnet mallet
    maple marble meadow mill mirror mitten monsoon moth mule needle nettle oar orchard orchid otter owl oyster
    paddle palace parcel parrot pebble pelican penguin pepper piano pillar pine plough pond prairie pumpkin
    quarry quilt rabbit raft raven ribbon river robin rocket saddle sail scarf shovel sparrow spoon squirrel
    staircase stream sundial swan table tambourine teapot temple thimble thistle tower trumpet tulip tunnel
    turnip turtle umbrella valley violin wagon walnut walrus waterfall whistle willow window wizard yarn zebra
    """
)
MONTHS = words(
    """
    January February March April May June July August September October November December
    """
)
_SYLLABLES = words(
    """
    ba bel cor dan del dor el fen gar hal ith jor kal lun mar mor nel or pel quin ran sol tar ul var wen xi yor
    zan
    """
)


_INITIALS = "ABCDEFGHJKLMNPRSTVWZ"
_INITIAL_SHARE = 0.1  # gives long lists enough different names


def number(rng: random.Random, digits: int | None = None) -> str:
    """Return a whole number of `digits` digits (3 to 9 when not given) without leading zeros."""
    digits = digits or rng.randint(3, 9)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def identifier(rng: random.Random) -> str:
    """Return a random UUID (version 4)."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def hex_code(rng: random.Random) -> str:
    """Return 6 to 12 hexadecimal digits."""
    return f"{rng.getrandbits(64):016x}"[: rng.randint(6, 12)]


def plate(rng: random.Random) -> str:
    """Return an upper-case reference such as `KQ-4821`."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(2, 3)))
    return f"{letters}-{number(rng, rng.randint(3, 5))}"


def word(rng: random.Random) -> str:
    """Return one common noun."""
    return rng.choice(NOUNS)


def word_pair(rng: random.Random) -> str:
    """Return an adjective and a noun, joined by a hyphen."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def invented_word(rng: random.Random) -> str:
    """Return a capitalised word that is in no dictionary, such as `Kalmordel`."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize()


def city(rng: random.Random) -> str:
    """Return the name of a city."""
    return rng.choice(CITIES)


def person(rng: random.Random) -> str:
    """Return a first and a last name, now and then with an initial between them."""
    initial = f" {rng.choice(_INITIALS)}." if rng.random() < _INITIAL_SHARE else ""
    return f"{rng.choice(FIRST_NAMES)}{initial} {rng.choice(LAST_NAMES)}"


def date(rng: random.Random) -> str:
    """Return a date between 1800 and 2040 in one of three notations."""
    day = datetime.date(1800, 1, 1) + datetime.timedelta(days=rng.randrange(240 * 365))
    name = MONTHS[day.month - 1]
    return rng.choice((f"{day.day} {name} {day.year}", f"{name} {day.day}, {day.year}", day.isoformat()))


def clock_time(rng: random.Random) -> str:
    """Return a time of day such as `17:05`."""
    return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"


def money(rng: random.Random) -> str:
    """Return an amount with its currency."""
    amount = rng.randrange(10, 10 ** rng.randint(3, 6))
    return rng.choice((f"${amount:,}", f"{amount:,} euros", f"{amount:,} pounds"))


def measure(rng: random.Random) -> str:
    """Return a quantity with its unit."""
    unit = rng.choice(("metres", "kilograms", "litres", "miles", "hours", "degrees", "tonnes", "pages", "feet"))
    return f"{rng.randrange(2, 2000)} {unit}"


GENERATORS: dict[str, Callable[[random.Random], str]] = {
    "number": number,
    "uuid": identifier,
    "hex": hex_code,
    "plate": plate,
    "word": word,
    "word_pair": word_pair,
    "invented": invented_word,
    "city": city,
    "person": person,
    "date": date,
    "time": clock_time,
    "money": money,
    "measure": measure,
}


@dataclass(frozen=True)
class Fact:
    """One key with its values: `key` is unique in its text, `values` are in the order in which they are planted."""

    key: str
    values: tuple[str, ...]


def random_facts(rng: random.Random, count: int, key_kind: str, value_kind: str, values_per_key: int = 1) -> list[Fact]:
    """Draw `count` facts whose keys and values all differ.

    Raises `UserError` for an unknown kind, or when a kind has too few different strings for so many facts.
    """
    keys = distinct(rng, key_kind, count)
    values = distinct(rng, value_kind, count * values_per_key, taken=set(keys))
    step = values_per_key
    return [Fact(key, tuple(values[i * step : (i + 1) * step])) for i, key in enumerate(keys)]


def distinct(rng: random.Random, kind: str, count: int, taken: set[str] | None = None) -> list[str]:
    """Draw `count` different strings of one kind of `GENERATORS`, none of them in `taken`."""
    if kind not in GENERATORS:
        raise unknown("kind of key or value", kind, GENERATORS)
    seen: set[str] = set(taken or ())
    drawn: list[str] = []
    for _ in range(40 * count + 400):
        if len(drawn) == count:
            return drawn
        text = GENERATORS[kind](rng)
        if text not in seen:
            seen.add(text)
            drawn.append(text)
    raise UserError(f"Kind {kind!r} has too few different strings for {count} facts. Use fewer facts or another kind.")


def spread(rng: random.Random, num_gaps: int, count: int) -> list[int]:
    """Draw `count` gaps of `num_gaps` at random, ascending; gaps repeat only if there are fewer gaps than facts."""
    if count > num_gaps:
        return sorted(rng.randrange(num_gaps) for _ in range(count))
    return sorted(rng.sample(range(num_gaps), count))


def plant(haystack: Sequence[Piece], needles: Sequence[Piece], gaps: Sequence[int]) -> tuple[list[Piece], list[int]]:
    """Insert needle j before haystack piece `gaps[j]` (`len(haystack)` = at the end).

    `gaps` ascends. Returns the joined pieces and the index of each needle in them. Raises `UserError` when a gap is
    outside the haystack, out of order, or not given for every needle.
    """
    if len(gaps) != len(needles) or list(gaps) != sorted(gaps):
        raise UserError(f"plant needs one gap for each of {len(needles)} needles, ascending; got {list(gaps)}.")
    if gaps and not 0 <= gaps[0] <= gaps[-1] <= len(haystack):
        raise UserError(f"Gaps must lie in 0..{len(haystack)}, got {list(gaps)}.")
    pieces: list[Piece] = []
    places: list[int] = []
    start = 0
    for needle, gap in zip(needles, gaps, strict=True):
        pieces += haystack[start:gap]
        places.append(len(pieces))
        pieces.append(needle)
        start = gap
    pieces += haystack[start:]
    return pieces, places
