"""The cache with room behind its keys and values holds what transformers' own holds, whatever is done to it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Cache, DynamicCache

from retrolm.engine.growing_cache import growing_cache

STEPS = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 3, 300])),
    st.tuples(st.just("crop"), st.integers(1, 2)),
    st.tuples(st.just("reorder"), st.permutations([0, 1])),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("reset"), st.none()),
)


def act(cache: Cache, name: str, value: Any, new: tuple[torch.Tensor, torch.Tensor]) -> None:
    """One step; rows come in twos, so that `reorder` swaps them whatever was repeated."""
    if name == "update":
        rows = 2 if not cache.layers or not cache.get_seq_length() else len(cache.layers[0].keys)
        found = cache.update(
            *(x[:1].expand(rows, -1, value, -1) * torch.arange(1, rows + 1)[:, None, None, None] for x in new), 0
        )
        assert found[0] is cache.layers[0].keys
    elif not cache.layers or cache.get_seq_length() <= 2:
        return
    elif name == "crop":
        cache.crop(-value)
    elif name == "reorder":
        rows = torch.arange(len(cache.layers[0].keys)).unflatten(0, (-1, 2))
        cache.reorder_cache(rows[:, value].flatten())
    elif name == "repeat":
        cache.batch_repeat_interleave(value)
    else:
        cache.reset()


@settings(deadline=None, max_examples=60)
@given(st.lists(STEPS, max_size=12))
def test_any_steps_leave_what_the_stock_cache_holds(steps: list[tuple[str, Any]]) -> None:
    ours, stock = growing_cache(), DynamicCache()
    for number, (name, value) in enumerate(steps):
        generator = torch.Generator().manual_seed(number)
        new = torch.randn(2, 1, 3, value if name == "update" else 1, 4, generator=generator)
        if stock.layers and stock.get_seq_length() and name == "repeat" and len(stock.layers[0].keys) > 8:
            continue
        for cache in (ours, stock):
            act(cache, name, value, (new[0], new[1]))
        assert ours.get_seq_length() == stock.get_seq_length()
        if stock.get_seq_length():
            assert torch.equal(ours.layers[0].keys, stock.layers[0].keys)
            assert torch.equal(ours.layers[0].values, stock.layers[0].values)


def test_a_step_copies_nothing_while_there_is_room() -> None:
    cache = growing_cache()
    for _ in range(3):
        cache.update(torch.ones(1, 2, 4, 3), torch.ones(1, 2, 4, 3), 0)
    before = cache.layers[0].keys.data_ptr()
    cache.update(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3), 0)
    assert cache.layers[0].keys.data_ptr() == before
