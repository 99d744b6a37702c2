"""Pages that the device itself looks after: what is read is what was written, and the slots used longest ago go.

They run on a GPU, or on a CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.store import PageLayout, gather, hot_pages, tiered
from retrolm.store.hot_pages import HotPages
from retrolm.store.pinned import PinnedSlabs
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
W, K, D = 4, 2, 8


def make(slots: int, num_pages: int, dtype: torch.dtype = torch.float32) -> HotPages:
    layout = PageLayout(W, K, D, dtype, (DEVICE,))
    host = PinnedSlabs(layout, DEVICE)
    pages = HotPages(layout, DEVICE, slots, host)
    for part in (num_pages // 3, num_pages - num_pages // 3):
        host.grow(part)
        pages.grow(part)
    return pages


def halves(ids: Tensor, value: float) -> tuple[Tensor, Tensor]:
    keys = (value + ids.float())[:, None, None, None].expand(-1, W, K, D).to(DEVICE).contiguous()
    return keys, -keys


def resident(pages: HotPages) -> set[int]:
    return {page for page in pages._page_in.tolist() if page >= 0}


@pytest.mark.parametrize(("slots", "most"), [(6, 4), (3, 9), (200, 150)])
def test_it_is_a_cache_of_pages(slots: int, most: int) -> None:
    """Writes, reads and settling in random order; more pages than slots are read, too."""
    generator = torch.Generator().manual_seed(slots)
    num_pages = 4 * most
    pages = make(slots, num_pages)
    held: dict[int, float] = {}
    fresh: set[int] = set()
    last_use: dict[int, int] = {}
    num_reads = num_misses = 0
    for step in range(12):
        num = int(torch.randint(1, most + 1, (), generator=generator))
        some = torch.randint(0, num_pages, (num,), generator=generator)
        if step % 3 == 0:
            ids = some.unique()
            fresh = set() if len(fresh) + len(ids) > slots else fresh
            pages.write(ids, *halves(ids, 1000.0 * step))
            held.update({page: 1000.0 * step + page for page in ids.tolist()})
            fresh.update(ids.tolist())
            assert not resident(pages) & fresh
        elif step % 7 == 0:
            pages.settle()
            fresh = set()
        ids = some[[page in held for page in some.tolist()]]
        if not len(ids):
            continue
        before, wanted = resident(pages), set(ids.tolist())
        pages.want(ids.to(DEVICE), torch.arange(num_pages, device=DEVICE))
        keys, values = pages.read(ids)
        expected = torch.tensor([held[page] for page in ids.tolist()])[:, None, None, None].expand(keys.shape)
        assert torch.equal(keys.cpu(), expected) and torch.equal(values, -keys)
        num_reads, num_misses = num_reads + len(wanted), num_misses + len(wanted - fresh - before)
        assert pages.reads() == (num_reads, num_misses)
        after = resident(pages)
        assert len(after) <= slots and after <= before | wanted
        assert wanted - fresh <= after or (len(after) == slots and after <= wanted)
        idle_left = [last_use.get(page, 0) for page in after - wanted]
        assert all(last_use.get(page, 0) <= min(idle_left, default=step) for page in before - after)
        last_use.update(dict.fromkeys(wanted, step))


def test_what_is_wanted_is_brought_once_and_pages_in_use_stay() -> None:
    pages = make(slots=3, num_pages=12)
    ids = torch.arange(12)
    pages.write(ids, *halves(ids, 0.0))
    pages.settle()
    table = torch.arange(11, -1, -1, device=DEVICE)  # ordinal o is page 11 - o
    pages.want(torch.tensor([[0, 1], [-1, 1]], device=DEVICE), table)
    assert resident(pages) == {11, 10} and pages.reads() == (2, 2)
    pages.want(torch.tensor([[1, 2], [1, 3]], device=DEVICE), table)
    assert resident(pages) == {10, 9, 8} and pages.reads() == (5, 4)


def test_fresh_pages_are_read_where_they_were_computed() -> None:
    pages = make(slots=4, num_pages=4)
    ids = torch.tensor([2, 1])
    keys, values = halves(ids, 0.0)
    pages.write(ids, keys, values)
    assert pages._table[:, ids].tolist() == [[x[0].data_ptr(), x[1].data_ptr()] for x in (keys, values)]
    pages.want(ids.to(DEVICE), torch.arange(4, device=DEVICE))
    assert resident(pages) == set() and pages.reads() == (2, 0)
    pages.settle()
    assert torch.equal(pages._table, pages._home)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("slots", [8, 20])
def test_a_model_reads_alike(bits: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float32).to(DEVICE)
    ids = random_ids(90)
    options = {"kv_budget": 32, "page_size": 8, "chunk_pages": 6, "store_bits": bits}
    lm = RetroLM(model, config=RetroConfig.from_options(options))
    expected = lm.logits(ids)
    lm.detach()
    monkeypatch.setattr(gather, "runs_on", lambda device: True)
    monkeypatch.setattr(tiered, "can_decide", lambda layout, device: True)
    unit = PageLayout(8, 2, 12, torch.float32, (DEVICE,), bits).page_bytes * lm.backbone.num_layers
    lm = RetroLM(model, config=RetroConfig.from_options({**options, "device_kv_bytes": slots * unit}))
    assert isinstance(lm.new_store(1)._tiers[0], hot_pages.HotPages)  # type: ignore[attr-defined]
    found = lm.logits(ids)
    assert float((found - expected).abs().max()) <= (1e-4 if bits == 16 else 0.05)
