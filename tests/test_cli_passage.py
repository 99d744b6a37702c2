"""The part of a page that is shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from retrolm.cli.passage import passage

PAGE = "The ship left at noon. " * 10 + "My father was a senator between 1854 and 1870. " + "Nobody spoke of it. " * 10


def test_the_part_nearest_to_the_question_is_shown() -> None:
    shown = passage(PAGE, "Between which years was the father a senator?", 60)
    assert "father was a senator between" in shown
    assert shown.startswith("…") and shown.endswith("…")


def test_without_a_match_the_beginning_is_shown() -> None:
    assert passage(PAGE, "xyzzy", 30) == "The ship left at noon. The…"


@given(st.text(), st.text(), st.integers(20, 90))
def test_any_text_becomes_one_line_that_fits(text: str, about: str, width: int) -> None:
    shown = passage(text, about, width)
    assert len(shown) <= width
    assert len(shown.splitlines()) <= 1
    assert bool(shown) == bool(text.split())


@given(st.lists(st.sampled_from(["father", "senator", "ship", "noon", "a"]), max_size=60), st.integers(20, 90))
def test_only_ends_are_left_out(words: list[str], width: int) -> None:
    assert passage(" ".join(words), "father", width).strip("…") in " ".join(words)
