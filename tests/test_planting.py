"""Planted facts: distinct keys and values, reproducible draws, and insertion at the places asked for."""

from __future__ import annotations

import random
import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.planting import GENERATORS, distinct, number, plant, random_facts, spread


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_kinds_are_reproducible_and_varied(kind: str) -> None:
    def drawn(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [GENERATORS[kind](rng) for _ in range(50)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert len(set(drawn(3))) > 20 and all(text.strip() == text != "" for text in drawn(3))


def test_formats() -> None:
    rng = random.Random(0)
    assert all(len(number(rng, 7)) == 7 for _ in range(50))
    assert uuid.UUID(GENERATORS["uuid"](rng)).version == 4
    assert re.fullmatch(r"[A-Z]{2,3}-\d{3,5}", GENERATORS["plate"](rng))
    assert re.fullmatch(r"[a-z]+-[a-z]+", GENERATORS["word_pair"](rng))
    assert re.fullmatch(r"[A-Z]\w+ ([A-Z]\. )?[A-Z]\w+", GENERATORS["person"](rng))


@given(count=st.integers(1, 40), values=st.integers(1, 4), seed=st.integers(0, 99))
def test_facts_are_distinct(count: int, values: int, seed: int) -> None:
    facts = random_facts(random.Random(seed), count, "person", "number", values)
    keys = [fact.key for fact in facts]
    everything = keys + [value for fact in facts for value in fact.values]
    assert len(keys) == count and len(set(everything)) == count * (1 + values)
    assert facts == random_facts(random.Random(seed), count, "person", "number", values)


def test_impossible_and_unknown_kinds() -> None:
    with pytest.raises(UserError, match="too few different"):
        distinct(random.Random(0), "city", 500)
    with pytest.raises(UserError, match="Did you mean 'number'"):
        random_facts(random.Random(0), 2, "person", "numbr")


@given(num_gaps=st.integers(1, 50), count=st.integers(0, 60), seed=st.integers(0, 9))
def test_spread(num_gaps: int, count: int, seed: int) -> None:
    gaps = spread(random.Random(seed), num_gaps, count)
    assert len(gaps) == count and gaps == sorted(gaps) and all(0 <= gap < num_gaps for gap in gaps)
    assert count > num_gaps or len(set(gaps)) == count


@given(straw=st.lists(st.integers(), max_size=20), count=st.integers(0, 8), seed=st.integers(0, 9))
def test_planting(straw: list[int], count: int, seed: int) -> None:
    needles = [f"needle {i}" for i in range(count)]
    gaps = spread(random.Random(seed), len(straw) + 1, count)
    pieces, places = plant(straw, needles, gaps)
    assert [pieces[place] for place in places] == needles
    assert [piece for piece in pieces if not isinstance(piece, str)] == straw
    assert [place - before for before, place in enumerate(places)] == gaps


@pytest.mark.parametrize("gaps", [[2, 1], [0], [0, 9], [-1, 0]])
def test_wrong_gaps_are_refused(gaps: list[int]) -> None:
    with pytest.raises(UserError):
        plant(["a", "b", "c"], ["x", "y"], gaps)
