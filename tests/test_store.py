"""Page stores: what goes in comes out, whatever the tier, the order and the cap (F4, F12)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrolm.errors import UserError
from retrolm.store import DigestIndex, PageLayout, PageStore, ResidentStore, TieredStore
from retrolm.store.layout import Slabs

LAYERS, W, K, D = 2, 3, 2, 4
CPU = torch.device("cpu")
PAGE_BYTES = 2 * W * K * D * 4


def layout(dtype: torch.dtype = torch.float32) -> PageLayout:
    return PageLayout(W, K, D, dtype, (CPU,) * LAYERS)


def make(kind: str, slots: int = 4) -> PageStore:
    if kind == "resident":
        return ResidentStore(layout())
    return TieredStore(layout(), slots * PAGE_BYTES * LAYERS + 5, min_pages=2)


def pages(ids: Tensor, salt: int) -> tuple[Tensor, Tensor]:
    """Keys and values that tell page and time of writing."""
    keys = (ids * 1000.0 + salt)[:, None, None, None].expand(-1, W, K, D)
    return keys.clone(), -keys


@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("kind", ["resident", "tiered"])
@given(data=st.data())
def test_a_store_is_a_dictionary_of_pages(kind: str, data: st.DataObject) -> None:
    store = make(kind)
    written: dict[tuple[int, int], int] = {}
    held: list[int] = []
    for step in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["reserve", "release", "write", "read", "read"]))
        if action == "reserve":
            new = store.reserve(data.draw(st.integers(0, 6))).tolist()
            assert not set(new) & set(held) and len(set(new)) == len(new) and new == sorted(new)
            held += new
        elif action == "release" and held:
            gone = data.draw(st.lists(st.sampled_from(held), unique=True))
            store.release(torch.tensor(gone, dtype=torch.int64))
            held = [page for page in held if page not in gone]
            written = {key: salt for key, salt in written.items() if key[1] not in gone}
        elif action == "write" and held:
            layer = data.draw(st.integers(0, LAYERS - 1))
            ids = torch.tensor(data.draw(st.lists(st.sampled_from(held), min_size=1, unique=True)))
            store.write(layer, ids, *pages(ids, step))
            written.update({(layer, page): step for page in ids.tolist()})
        elif written:
            layer = data.draw(st.sampled_from(sorted({layer for layer, _ in written})))
            there = [page for at, page in written if at == layer]
            ids = torch.tensor(data.draw(st.lists(st.sampled_from(there), min_size=1, max_size=12)))
            keys, values = store.read(layer, ids)
            salts = torch.tensor([written[layer, page] for page in ids.tolist()])
            expected = (ids * 1000.0 + salts)[:, None, None, None].expand(-1, W, K, D)
            assert torch.equal(keys, expected) and torch.equal(values, -expected)
        assert store.num_used == len(held)


def test_the_page_used_longest_ago_is_evicted() -> None:
    store = TieredStore(layout(), 3 * PAGE_BYTES * LAYERS, min_pages=1)
    ids = store.reserve(4)
    for page in ids:
        store.write(0, page[None], *pages(page[None], 0))
    store.read(0, ids[1:])  # written last, still there
    assert store.hit_rate == 1.0
    store.read(0, ids[1:2])
    store.read(0, ids[:1])  # page 2 goes: 1 was used after it, 3 stands behind it
    store.read(0, ids[1:2])
    assert store.hit_rate == 1 - 1 / 6
    store.read(0, ids)  # more pages than slots: read in parts
    assert 0 < store.hit_rate < 1


@pytest.mark.parametrize("kind", ["resident", "tiered"])
def test_a_page_is_rounded_once_when_written(kind: str) -> None:
    half = layout(torch.bfloat16)
    store = ResidentStore(half) if kind == "resident" else TieredStore(half, 10_000, 1)
    ids, exact = store.reserve(6), torch.randn(6, W, K, D)
    store.write(0, ids, exact, exact)
    for _ in range(2):
        keys, values = store.read(0, ids.flip(0))
        assert keys.dtype == torch.bfloat16
        assert torch.equal(keys, exact.bfloat16().flip(0)) and torch.equal(values, keys)


def test_bytes() -> None:
    resident, tiered = make("resident"), make("tiered", slots=4)
    for store in (resident, tiered):
        ids = store.reserve(10)
        store.release(ids[:3])
    assert (resident.bytes().device, resident.bytes().host) == (7 * PAGE_BYTES * LAYERS, 0)
    assert (tiered.bytes().device, tiered.bytes().host) == (4 * PAGE_BYTES * LAYERS, 7 * PAGE_BYTES * LAYERS)
    assert layout().page_bytes == PAGE_BYTES


def test_a_cap_below_one_page_and_its_set_says_what_it_takes() -> None:
    with pytest.raises(
        UserError, match=f"device_kv_bytes=500 holds 1 pages .* takes 3.* at least {3 * 2 * PAGE_BYTES}"
    ):
        TieredStore(layout(), 500, min_pages=3)


def test_growing_copies_nothing() -> None:
    slabs = Slabs(layout(), CPU)
    slabs.grow(4)
    before = [tensor.data_ptr() for tensor in (*slabs._keys, *slabs._values)]
    slabs.grow(3)
    assert [slabs._keys[0].data_ptr(), slabs._values[0].data_ptr()] == before
    ids = torch.tensor([6, 0, 3, 4])
    slabs.write(ids, *pages(ids, 1))
    assert torch.equal(slabs.read(ids)[0], pages(ids, 1)[0])
    assert slabs.bytes() == 7 * PAGE_BYTES


def test_threads_never_get_the_same_page() -> None:
    store = make("resident")

    def work(_: int) -> list[int]:
        mine: list[int] = []
        for _ in range(50):
            mine += store.reserve(3).tolist()
            store.release(mine[:1])
            mine = mine[1:]
        return mine

    with ThreadPoolExecutor(4) as pool:
        found = [page for pages_of_one in pool.map(work, range(4)) for page in pages_of_one]
    assert len(found) == len(set(found)) == store.num_used


def test_digests_grow_and_keep_their_dtype() -> None:
    index = DigestIndex()
    for first in (0, 60, 500):
        ids = torch.arange(first, first + 7)
        index.write(1, ids, ids[:, None].double() * torch.ones(1, 5))
    found = index.read(1, torch.tensor([506, 3, 62]))
    assert found.tolist() == [[506.0] * 5, [3.0] * 5, [62.0] * 5] and found.dtype == torch.float64
    assert index.bytes() >= 507 * 5 * 8
