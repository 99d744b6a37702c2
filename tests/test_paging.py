"""Pages and their places, over all shapes (hypothesis)."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrolm.paging import PageTable, page_lengths, place, room_for_past, start_position


@settings(deadline=None)
@given(num_tokens=st.integers(0, 500), page_size=st.integers(1, 40))
def test_page_lengths_cut_everything_into_full_pages_but_the_last(num_tokens: int, page_size: int) -> None:
    lengths = page_lengths(num_tokens, page_size)
    assert sum(lengths) == num_tokens
    assert all(length == page_size for length in lengths[:-1])
    assert all(0 < length <= page_size for length in lengths)


@st.composite
def tables(draw: st.DrawFn) -> PageTable:
    """A document as reading and conversations make it: sink pages, full pages, short ones in between."""
    page_size = draw(st.integers(1, 12))
    sinks = page_lengths(draw(st.integers(1, 3 * page_size)), page_size)
    others = draw(st.lists(st.one_of(st.just(page_size), st.integers(1, page_size)), max_size=12))
    lengths = torch.tensor(sinks + others)
    return PageTable(torch.arange(len(lengths)), lengths, len(sinks), page_size)


@settings(deadline=None)
@given(table=tables(), data=st.data())
def test_room_keeps_every_set_within_the_budget(table: PageTable, data: st.DataObject) -> None:
    strict = data.draw(st.booleans())
    num_past = data.draw(st.integers(table.num_sink, len(table)))
    own = data.draw(st.integers(1, 2 * table.page_size))
    budget = table.sink_tokens + own + data.draw(st.integers(0, 10 * table.page_size))
    room = room_for_past(table, num_past, own, budget, strict)
    past = table.lengths[:num_past]
    largest = int(past[table.num_sink :].sort(descending=True).values[: max(room, 0)].sum()) + table.sink_tokens
    assert largest + (own if strict else 0) <= budget
    assert start_position(table, num_past, room) <= budget
    assert largest <= start_position(table, num_past, room) or largest == int(past.sum())
    everything = int(past.sum()) + (own if strict else 0) <= budget
    assert not everything or room >= num_past - table.num_sink


@settings(deadline=None)
@given(table=tables(), longer=st.lists(st.integers(1, 12), max_size=4))
def test_an_extended_table_keeps_what_it_had(table: PageTable, longer: list[int]) -> None:
    lengths = torch.tensor([min(length, table.page_size) for length in longer], dtype=torch.int64)
    found = table.extended(torch.arange(len(lengths)) + 100, lengths)
    assert len(found) == len(table) + len(longer) and found.num_sink == table.num_sink
    assert found.tokens_before[: len(table)].tolist() == table.tokens_before.tolist()
    assert found.starts[: len(table)].tolist() == table.starts.tolist()
    assert found.num_tokens == table.num_tokens + int(lengths.sum())


def naive_places(lengths: list[int], starts: list[int], end: int, page_size: int) -> dict[int, int]:
    """Place in the gathered row → compact position, counted token by token from the right."""
    found, position = {}, end
    for slot in reversed(range(len(lengths))):
        for inside in reversed(range(lengths[slot])):
            position -= 1
            found[slot * page_size + starts[slot] + inside] = position
    return found


@settings(deadline=None)
@given(table=tables(), data=st.data())
def test_places_end_right_before_the_page_and_have_no_holes(table: PageTable, data: st.DataObject) -> None:
    sets = data.draw(
        st.lists(st.lists(st.integers(-1, len(table) - 1), min_size=3, max_size=3), min_size=1, max_size=4)
    )
    picked = torch.tensor(sets)
    lengths = table.lengths[picked.clamp(min=0)] * (picked >= 0)
    starts = table.starts[picked.clamp(min=0)]
    ends = [int(row.sum()) + data.draw(st.integers(0, 5)) for row in lengths]
    found = place(lengths, starts, torch.tensor(ends), table.page_size)
    for row, end in enumerate(ends):
        expected = naive_places(lengths[row].tolist(), starts[row].tolist(), end, table.page_size)
        assert found.valid[row].nonzero().flatten().tolist() == sorted(expected)
        assert {at: int(found.positions[row, at]) for at in expected} == expected
        assert sorted(expected.values()) == list(range(end - len(expected), end))
    assert not found.positions[~found.valid].any()
