"""The disk tier: a text larger than host memory reads as if it fitted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.store import DiskStore, PageLayout, ResidentStore
from retrolm.store.disk import CachedSlabs, FileSlabs, SpillFile
from test_against_naive import random_retriever
from tiny_models import random_ids, tiny_model

LAYERS, W, K, D = 2, 3, 2, 4
CPU = torch.device("cpu")


def layout(dtype: torch.dtype = torch.float32) -> PageLayout:
    return PageLayout(W, K, D, dtype, (CPU,) * LAYERS)


def random_pages(num_pages: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_pages, W, K, D)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))  # type: ignore[return-value]


@settings(deadline=None, max_examples=40)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_it_holds_what_a_resident_store_holds(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: torch.dtype
) -> None:
    shape = layout(dtype)
    cap = 3 * shape.page_bytes * LAYERS
    stores = [DiskStore(shape, cap, tmp_path_factory.mktemp("spill"), min_pages=2), ResidentStore(shape)]
    for store in stores:
        store.reserve(12)
    written: set[int] = set()
    for step in range(data.draw(st.integers(1, 12))):
        layer = data.draw(st.integers(0, LAYERS - 1))
        ids = torch.tensor(data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True)))
        if data.draw(st.booleans()):
            for store in stores:
                for each in range(LAYERS):
                    store.write(each, ids, *random_pages(len(ids), step * 2 + each, dtype))
            written |= set(ids.tolist())
        known = torch.tensor([page for page in ids.tolist() if page in written], dtype=torch.int64)
        if len(known):
            (k1, v1), (k2, v2) = (store.read(layer, known) for store in stores)
            assert torch.equal(k1, k2) and torch.equal(v1, v2)
    assert stores[0].bytes().device <= cap


def test_the_middle_tier_of_three_holds_pages_too(tmp_path: Path) -> None:
    """What stands between a GPU and the disk, tried without a GPU."""
    file = SpillFile(layout(), tmp_path)
    slabs = CachedSlabs(FileSlabs(file, layout(), 1), layout(), slots=2)
    slabs.grow(6)
    ids = torch.arange(6)
    keys, values = random_pages(6, 3, torch.float32)
    slabs.write(ids, keys, values)
    picked = torch.tensor([5, 0, 3, 0])
    found = slabs.read(picked)
    assert torch.equal(found[0], keys[picked]) and torch.equal(found[1], values[picked])
    assert slabs.bytes() == 2 * layout().page_bytes and file.bytes() >= 6 * layout().page_bytes


def test_three_tiers_as_one_store(tmp_path: Path) -> None:
    unit = layout().page_bytes * LAYERS
    store = DiskStore(layout(), 4 * unit, tmp_path, min_pages=2, device_bytes=2 * unit)
    ids = store.reserve(9)
    keys, values = random_pages(9, 1, torch.float32)
    for layer in range(LAYERS):
        store.write(layer, ids, keys + layer, values)
    for layer in range(LAYERS):
        assert torch.equal(store.read(layer, ids)[0], keys + layer)
    found = store.bytes()
    assert (found.device, found.host) == (2 * unit, 4 * unit) and found.disk >= 9 * unit


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_spilled_reading_equals_resident_reading(name: str, tmp_path: Path) -> None:
    model, ids = tiny_model(name), random_ids(200)
    config = RetroConfig(kv_budget=48, page_size=8, chunk_pages=5)
    plain, spilled = RetroLM(model, config=config), RetroLM(model, config=config)
    retriever = random_retriever(plain, 2)
    plain.use_retriever(retriever)
    spilled.use_retriever(retriever)
    cap = 10 * spilled.page_layout().page_bytes * spilled.backbone.num_layers
    spilled.use_disk_tier(tmp_path, cap)
    assert torch.equal(plain.logits(ids), spilled.logits(ids))
    documents = [lm.read(ids.tolist()) for lm in (plain, spilled)]
    held = documents[1].encoder.parts.store.bytes()
    assert held.device <= cap < held.disk
    for layer in range(4):
        pages = [doc.encoder.parts.store.read(layer, doc.table.ids) for doc in documents]
        assert torch.equal(pages[0][0], pages[1][0]) and torch.equal(pages[0][1], pages[1][1])
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_a_cap_that_holds_no_working_set_is_refused(tmp_path: Path) -> None:
    lm = RetroLM(tiny_model("llama"), config=RetroConfig(kv_budget=48, page_size=8))
    lm.use_disk_tier(tmp_path, 1000)
    with pytest.raises(UserError, match="host_kv_bytes=1000 holds 0 pages"):
        lm.logits(random_ids(20))


def test_a_gpu_needs_both_caps(tmp_path: Path) -> None:
    shape = PageLayout(W, K, D, torch.float32, (torch.device("cuda"),) * LAYERS)
    with pytest.raises(UserError, match="device_kv_bytes"):
        DiskStore(shape, 1 << 20, tmp_path, min_pages=1)
