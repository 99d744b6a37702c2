"""Sentences over the border of two texts count for both."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrolm.cut_sentences import with_cut_sentences

SENTENCES = st.lists(st.lists(st.sampled_from(["key", "a", "Dr", "4.5", "naïve"]), min_size=1, max_size=8), min_size=1)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], []),
        (["alone"], ["alone"]),
        (["One. The ho", "use is 47. Two."], ["One. The house is 47.", " The house is 47. Two."]),
        (["It is 4.", "7 m. Two."], ["It is 4.7 m.", "It is 4.7 m. Two."]),
        (["One.", " Two."], ["One.", " Two."]),
        (["He said \"go.\"", " Two"], ["He said \"go.\"", " Two"]),
        (["1\n", "2\n"], ["1\n", "2\n"]),
        (["钥匙在", "这里。门"], ["钥匙在这里。", "钥匙在这里。门"]),
        (["", "One.", ""], ["", "One.", ""]),
        (["a b", "c d", "e. f"], ["a bc d", "a bc de.", "c de. f"]),
    ],
)  # fmt: skip
def test_the_rest_of_a_sentence_is_added(texts: list[str], expected: list[str]) -> None:
    assert with_cut_sentences(texts) == expected


@given(SENTENCES, st.data())
def test_wherever_the_border_is_the_sentence_is_whole_on_both_sides(
    words: list[list[str]], data: st.DataObject
) -> None:
    sentences = [" ".join(row) + "." for row in words]
    text = " ".join(sentences)
    at = data.draw(st.integers(0, len(text)))
    first, second = with_cut_sentences([text[:at], text[at:]])
    start = 0
    for sentence in sentences:
        end = start + len(sentence)
        if start < at < end - 1:
            assert sentence in first and sentence in second
        start = end + 1
    assert first.startswith(text[:at]) and second.endswith(text[at:])
    assert len(first) + len(second) <= len(text) + max(map(len, sentences)) + 1


def test_texts_without_sentences_grow_by_32_words_at_either_end() -> None:
    rows = with_cut_sentences([" ".join(f"{page}x{i}" for i in range(100)) + " " for page in range(3)])
    assert [len(row.split()) for row in rows] == [132, 164, 132]
    assert rows[1].split()[31:34] == ["0x99", "1x0", "1x1"] and rows[1].split()[-1] == "2x31"
