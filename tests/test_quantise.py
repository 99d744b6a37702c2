"""Quantised pages: small, near the numbers they stand for, and the same bytes whoever reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cli_runner import run_cli
from grids import some
from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.store import DiskStore, PageLayout, PageStore, ResidentStore, TieredStore
from retrolm.store.quantise import dequantise, quantise, record_bytes
from tiny_models import random_ids, tiny_model

CPU = torch.device("cpu")
REAL_EMPTY = torch.empty


def poisoned(*shape: Any, **options: Any) -> Tensor:
    """`torch.empty` whose contents nobody may use."""
    out = REAL_EMPTY(*shape, **options)
    return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(255 if out.dtype == torch.uint8 else 0)


def layout(bits: int, page_size: int = 16, dim: int = 8, dtype: torch.dtype = torch.float32) -> PageLayout:
    return PageLayout(page_size, 2, dim, dtype, (CPU, CPU), bits)


def outlying(shape: PageLayout, num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys with channels far from zero, values with tokens of unlike size, as models make them."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(num, *shape.page_shape, generator=generator) for _ in range(2))
    offsets = 200 * torch.randn(shape.num_kv_heads, shape.head_dim, generator=generator).pow(3)
    sizes = 10 * torch.rand(num, shape.page_size, shape.num_kv_heads, 1, generator=generator)
    return (keys + offsets).to(shape.dtype), (values * sizes).to(shape.dtype)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("bits", "share"), [(8, 0.53), (4, 0.29)])
def test_bytes_against_bfloat16(bits: int, share: float, dim: int) -> None:
    plain = PageLayout(128, 8, dim, torch.bfloat16, (CPU,))
    small = PageLayout(128, 8, dim, torch.bfloat16, (CPU,), bits)
    assert small.page_bytes == record_bytes(small.page_shape, bits)
    assert small.page_bytes <= share * plain.page_bytes


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([8, 4]),
    page_size=st.integers(1, 40),
    dim=st.sampled_from([2, 8, 12, 64]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_errors_are_within_half_a_step(bits: int, page_size: int, dim: int, seed: int, dtype: torch.dtype) -> None:
    shape = layout(bits, page_size, dim, torch.float32)
    keys, values = (x.to(dtype) for x in outlying(shape, 3, seed))
    halves = quantise(keys, values, bits)
    assert all(half.dtype == torch.uint8 and half.shape == (3, shape.page_bytes // 2) for half in halves)
    found = dequantise(*halves, shape.page_shape, bits, dtype)
    for x, y, axis in ((keys, found[0], 1), (values, found[1], 3)):
        x, y = x.double(), y.double()
        low, high = x.amin(axis, True), x.amax(axis, True)
        # half a step; float16 scales (coarse below 6e-5); the rounding of the result to its own dtype
        bar = (high - low + low.abs() * 2**-9) / (2**bits - 1) * 0.51 + x.abs() * torch.finfo(dtype).eps + 1e-5
        assert ((x - y).abs() <= bar).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_outlying_channels_cost_the_others_nothing(bits: int) -> None:
    shape = layout(bits, 32)
    keys, values = outlying(shape, 2)
    tame = keys - keys.mean(1, keepdim=True)
    errors = []
    for each in (keys, tame):
        found, _ = dequantise(*quantise(each, values, bits), shape.page_shape, bits, torch.float64)
        errors.append((found - each).abs().mean())
    assert errors[0] <= 1.5 * errors[1] + 0.05


@pytest.mark.parametrize("bits", [8, 4])
def test_padding_widens_no_range(bits: int) -> None:
    """Sink pages and last pages are short; the rest of their room is zeros."""
    shape = layout(bits, 16)
    keys, values = outlying(shape, 1)
    short = [x.clone() for x in (keys, values)]
    for x in short:
        x[:, :11] = 0
    found, _ = dequantise(*quantise(short[0], short[1], bits), shape.page_shape, bits, torch.float32)
    assert found.isfinite().all()
    span = keys[:, 11:].amax(1) - keys[:, 11:].amin(1)
    assert ((found - keys)[:, 11:].abs().amax(1) <= span / (2**bits - 1) + keys.abs().amax(1) * 2e-3).all()


def test_constant_and_empty_pages_survive() -> None:
    shape = layout(4)
    for fill in (0.0, 3.0, -211.0, 1e-9):
        page = torch.full((1, *shape.page_shape), fill)
        for x in dequantise(*quantise(page, page, 4), shape.page_shape, 4, torch.float32):
            assert x.sub(fill).abs().max() <= 2e-3 * abs(fill) + 1e-5


def stores(bits: int, folder: Any) -> list[PageStore]:
    shape = layout(bits)
    cap = 3 * shape.page_bytes * shape.num_layers
    return [ResidentStore(shape), TieredStore(shape, cap, 1), DiskStore(shape, cap, folder, 1)]


@pytest.mark.parametrize("bits", [8, 4])
def test_all_tiers_read_the_same(bits: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hot and cold, read once or again; room that was never written is poisoned."""
    monkeypatch.setattr(torch, "empty", poisoned)
    keys, values = outlying(layout(bits), 9)
    found = []
    for store in stores(bits, tmp_path):
        ids = store.reserve(9)
        for layer in range(2):
            store.write(layer, ids, keys, values)
        reads = [store.read(1, part) for part in (ids, ids.flip(0), ids[2:4], ids[[7, 7, 0]])]
        found.append(reads)
    for reads in found[1:]:
        for got, want in zip(reads, found[0], strict=True):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_stats_say_what_moved(tmp_path: Any) -> None:
    resident, tiered, _ = stores(8, tmp_path)
    keys, values = outlying(layout(8), 9)
    for store in (resident, tiered):
        ids = store.reserve(9)
        store.write(0, ids, keys, values)
        for page in (0, 1, 0, 8):
            store.read(0, ids[page : page + 1])
    assert resident.stats().hit_rate == 1.0 and resident.stats().bytes_to_device == 0
    stats, size = tiered.stats(), layout(8).page_bytes
    assert (stats.pages_read, stats.pages_missed, stats.hit_rate) == (4, 3, 0.25)
    assert (stats.bytes_to_device, stats.bytes_to_host) == (3 * size, 9 * size)


def test_the_device_tier_grows_with_the_pages() -> None:
    shape = layout(16)
    unit = shape.page_bytes * shape.num_layers
    store = TieredStore(shape, 1000 * unit, 1)
    assert store.bytes().device == 0
    first = store.reserve(3)
    keys, values = outlying(shape, 12)
    store.write(0, first, keys[:3], values[:3])
    assert store.bytes().device == 3 * unit
    second = store.reserve(9)
    store.write(0, second, keys[3:], values[3:])
    assert store.bytes().device == 12 * unit
    assert torch.equal(store.read(0, torch.cat([first, second]))[0], keys)
    assert store.stats().hit_rate == 1.0


def test_pages_outlive_the_step_beyond_the_cap() -> None:
    """While all pages fit they stand in slots of their own number; then the oldest make room."""
    shape = layout(16)
    store = TieredStore(shape, 5 * shape.page_bytes * shape.num_layers, 1)
    keys, values = outlying(shape, 12)
    for first, last in ((0, 2), (2, 5), (5, 12)):
        ids = store.reserve(last - first)
        store.write(0, ids, keys[first:last], values[first:last])
        for page in range(last):
            found = store.read(0, torch.tensor([page]))
            assert torch.equal(found[0][0], keys[page]) and torch.equal(found[1][0], values[page])
    assert store.stats().hit_rate < 1.0 and store.bytes().device == 5 * shape.page_bytes * shape.num_layers


@pytest.mark.parametrize(("name", "bits"), some(["llama", "gemma2"], [8, 4], each=1))
def test_chunked_is_page_by_page_is_offloaded(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned)
    model, ids = tiny_model(name), random_ids(150)
    unit = layout(bits, 8, 12).page_bytes * 4
    ways: list[dict[str, Any]] = [{"chunk_pages": 1}, {"chunk_pages": 7}, {"device_kv_bytes": 14 * unit}]
    logits, answers = [], []
    for way in ways:
        lm = RetroLM(model, config=RetroConfig.from_options(dict(kv_budget=48, page_size=8, store_bits=bits, **way)))
        logits.append(lm.logits(ids))
        answers.append(lm.generate(ids[None], max_new_tokens=8, do_sample=False).tolist())
        lm.detach()
    assert all((x - logits[0]).abs().max() <= 1e-9 for x in logits) and answers[1:] == answers[:1] * 2


def test_more_bits_are_nearer_to_the_model() -> None:
    model, ids = tiny_model("llama"), random_ids(100)
    found = {}
    for bits in (16, 8, 4):
        lm = RetroLM(model, config=RetroConfig(kv_budget=128, page_size=16, store_bits=bits))  # type: ignore[arg-type]
        found[bits] = lm.logits(ids)
        lm.detach()
    errors = [(found[bits] - found[16]).abs().mean() for bits in (8, 4)]
    assert 0 < errors[0] < errors[1] / 5 and errors[0] < 0.05 * found[16].abs().mean()


def test_only_these_bits(desk: Any) -> None:
    with pytest.raises(UserError, match=r"store_bits=5 is not a choice. Allowed: 16, 4, 8"):
        RetroConfig(store_bits=5)  # type: ignore[arg-type]
    outcome = run_cli("ask", *desk.options, "--set", "store_bits=8", desk.text, "Who?", "--json")
    assert outcome.code == 0
    run_cli("ask", *desk.options, "--set", "store_bits=7", desk.text, "Who?").refused_in_one_line("store_bits")
