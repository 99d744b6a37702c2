"""Page labels of stage-1 samples: overlap rule D15 (b), checked against a token-by-token count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.training.data import Stage1Sample, page_labels

EMPTY = np.zeros(0, np.int32)


def sample_with(length: int, spans: list[tuple[int, int]], masked: list[tuple[int, int]] | None = None) -> Stage1Sample:
    return Stage1Sample(np.zeros(length, np.int32), EMPTY, EMPTY, tuple(spans), "test", tuple(masked or ()))


def labels(length: int, spans: list[tuple[int, int]], page_size: int, masked: list[tuple[int, int]] | None = None):
    positives, hidden = page_labels(sample_with(length, spans, masked), page_size)
    return positives.tolist(), hidden.tolist()


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ((10, 90), ([0], [])),  # inside one page
        ((100, 200), ([0, 1], [])),  # 28 and 72 of 100: both at least a quarter
        ((110, 200), ([1], [0])),  # 18 of 90 is less than a quarter
        ((121, 136), ([1], [0])),  # 7 and 8 tokens of 15: at least 8 needed
        ((122, 134), ([0, 1], [])),  # 6 and 6 of 12: neither has 8, the largest count
        ((124, 134), ([1], [0])),  # 4 and 6 of 10
        ((100, 700), ([1, 2, 3, 4], [0, 5])),  # long: 28 and 60 tokens are under a quarter of two pages
        ((64, 640), ([0, 1, 2, 3, 4], [])),  # long: 64 tokens are a quarter of two pages
    ],
)
def test_overlap_rule(span: tuple[int, int], expected: tuple[list[int], list[int]]) -> None:
    assert labels(1024, [span], 128) == expected


def test_masked_spans_never_hide_a_positive() -> None:
    assert labels(1024, [(0, 100)], 128, masked=[(50, 400)]) == ([0], [1, 2, 3])


def test_page_size_is_checked() -> None:
    with pytest.raises(UserError, match="page_size"):
        page_labels(sample_with(10, [(0, 5)]), 0)


@given(
    spans=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 900)), max_size=5),
    page_size=st.sampled_from([1, 32, 63, 128, 256]),
)
def test_labels_against_counting_tokens(spans: list[tuple[int, int]], page_size: int) -> None:
    places = [(start, start + length) for start, length in spans]
    positives, masked = labels(5000, places, page_size)
    assert not set(positives) & set(masked)
    touched: set[int] = set()
    for start, end in places:
        counted: dict[int, int] = {}
        for token in range(start, end):
            counted[token // page_size] = counted.get(token // page_size, 0) + 1
        touched |= set(counted)
        best = max(counted.values())
        assert {page for page, count in counted.items() if count == best} <= set(positives)
        quarter = 0.25 * min(end - start, 2 * page_size)
        assert {page for page, count in counted.items() if count >= max(8, quarter)} <= set(positives)
    assert set(positives) | set(masked) == touched
