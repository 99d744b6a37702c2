"""The tiers on a GPU: pinned slabs, copies on streams of their own, one kernel that reads over the bus."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.store import PageLayout, ResidentStore, TieredStore
from retrolm.store import pinned as pinned_module
from retrolm.store.fetch import copy_records
from retrolm.store.quantise import dequantise, dequantise_reference, quantise
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LAYERS = 2


def layout(bits: int, dtype: torch.dtype = torch.bfloat16, page_size: int = 16, dim: int = 64) -> PageLayout:
    return PageLayout(page_size, 2, dim, dtype, (CUDA,) * LAYERS, bits)


def pages(shape: PageLayout, num: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(CUDA).manual_seed(seed)
    made = (torch.randn(num, *shape.page_shape, device=CUDA, generator=generator) for _ in range(2))
    keys, values = (x.to(shape.dtype) for x in made)
    return keys, values


@pytest.mark.parametrize("num_bytes", [8, 4096, 8200, 270_336])
def test_records_are_copied_between_host_and_device(num_bytes: int) -> None:
    source = torch.randint(0, 256, (9, num_bytes), dtype=torch.uint8, pin_memory=True)
    target = torch.full((12, num_bytes), 7, dtype=torch.uint8, device=CUDA)
    picks, slots = torch.tensor([8, 0, 3]), torch.tensor([1, 11, 4])
    copy_records(
        (source.data_ptr() + picks * num_bytes).to(CUDA), (target.data_ptr() + slots * num_bytes).to(CUDA), num_bytes
    )
    assert torch.equal(target[slots].cpu(), source[picks])
    rest = [i for i in range(12) if i not in slots.tolist()]
    assert (target[rest] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("page_shape", [(16, 2, 64), (63, 8, 96), (256, 1, 128), (7, 3, 12)])
def test_dequantising_is_what_plain_pytorch_does(
    page_shape: tuple[int, int, int], bits: int, dtype: torch.dtype
) -> None:
    shape = PageLayout(*page_shape, dtype, (CUDA,), bits)
    halves = quantise(*pages(shape, 5, 0), bits)
    found = dequantise(*halves, page_shape, bits, dtype)
    expected = dequantise_reference(*(half.cpu() for half in halves), page_shape, bits, dtype)
    for x, y in zip(found, expected, strict=True):
        assert (x.cpu().float() - y.float()).abs().max() <= 8 * torch.finfo(dtype).eps * y.float().abs().max()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("page_size", [16, 63, 128])
@pytest.mark.parametrize("slab_bytes", [2**15, 2**24])
def test_tiers_read_the_same(bits: int, page_size: int, slab_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random writes and reads, with slabs of a few pages and a cache of ten."""
    monkeypatch.setattr(pinned_module, "SLAB_BYTES", slab_bytes)
    shape = layout(bits, page_size=page_size)
    tiered, resident = TieredStore(shape, 10 * shape.page_bytes * LAYERS, 2), ResidentStore(shape)
    ids = [tiered.reserve(40), resident.reserve(40)][0]
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        for store in (tiered, resident):
            store.write(layer, ids, *pages(shape, 40, layer))
    for step in range(60):
        layer = step % LAYERS
        some = torch.randint(0, 40, (int(torch.randint(1, 14, (), generator=generator)),), generator=generator)
        if step % 7 == 0:
            new = pages(shape, len(some.unique()), 100 + step)
            for store in (tiered, resident):
                store.write(layer, some.unique(), *new)
        tiered.want(layer, some.to(CUDA)[None], ids.to(CUDA))
        found, expected = (store.read(layer, some.to(CUDA)) for store in (tiered, resident))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    stats = tiered.stats()
    assert 0 < stats.hit_rate < 1 and stats.pin_s > 0 and stats.bytes_to_device > 0


@pytest.mark.parametrize(("bits", "bar"), [(16, 1e-4), (8, 0.05), (4, 0.5)])
def test_a_model_reads_alike_from_all_tiers(bits: int, bar: float) -> None:
    """Chunks of other sizes multiply in other orders, and a last bit can move a quantised number by a step."""
    model = tiny_model("llama", dtype=torch.float32).cuda()
    ids = random_ids(400)
    unit = PageLayout(8, 2, 12, torch.float32, (CUDA,), bits).page_bytes * 4
    ways: list[dict[str, Any]] = [{}, {"chunk_pages": 3}, {"device_kv_bytes": 15 * unit}]
    found = []
    for way in ways:
        options = {"kv_budget": 64, "page_size": 8, "store_bits": bits, **way}
        lm = RetroLM(model, config=RetroConfig.from_options(options))
        found.append(lm.logits(ids))
        lm.detach()
    assert all((x - found[0]).abs().max() <= bar for x in found[1:])
