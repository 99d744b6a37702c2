"""F4, F5: neither chunks nor tiers nor what lies in unselected pages change a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grids import pairs
from retrolm.config import RetroConfig
from retrolm.engine.document import Document
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.store import PageStore, ResidentStore, TieredStore
from retrolm.store.layout import Slabs
from test_against_naive import random_retriever
from tiny_models import random_ids, tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

W, BUDGET = 8, 40
FAMILIES = ["llama", "mistral-sliding", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"]
PAGE_BYTES = 2 * W * 2 * 12 * 8 * 4  # K and V, tokens, KV heads, head dim, float64, layers


def make(name: str, vocab_size: int = 128, **options: Any) -> RetroLM:
    """An engine with a random trained retriever, so that selections are no accident of the copy."""
    config = RetroConfig.from_options({"kv_budget": BUDGET, "page_size": W, **options})
    lm = RetroLM(
        tiny_model(name, vocab_size=vocab_size), tiny_tokenizer() if vocab_size == 600 else None, config=config
    )
    lm.use_retriever(random_retriever(lm, 4))
    return lm


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_chunking_gives_the_same_logits(name: str, causal: bool) -> None:
    ids = random_ids(163)
    by_page = make(name, chunk_pages=1, causal_selection=causal).logits(ids)
    for chunk_pages in (2, 5, 16, 100):
        found = make(name, chunk_pages=chunk_pages, causal_selection=causal).logits(ids)
        assert (found - by_page).abs().max() <= 1e-6
    assert (make(name, kv_budget=200).logits(ids) - by_page).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "mode", "causal"),
    pairs(["llama", "mistral-sliding", "gemma3"], ["recent", "mean_key", "full"], [False, True]),
)
def test_the_dense_block_changes_nothing(name: str, mode: str, causal: bool) -> None:
    """Chunks that begin below the budget and end beyond it, and layers that attend everything."""
    ids = random_ids(163)
    options: dict[str, Any] = {"first_layer_mode": mode, "causal_selection": causal, "chunk_pages": 7}
    off, on = (make(name, dense_bypass=bypass, **options).logits(ids) for bypass in (False, True))
    assert (off - on).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_conversation_that_outgrows_the_budget(name: str) -> None:
    """Pages read as one block are ordinary pages to what comes later."""
    answers = []
    for bypass in (False, True):
        talk = make(name, 600, dense_bypass=bypass, kv_budget=160).read(STORY).conversation()
        answers.append([talk.ask(q, raw=True, max_new_tokens=40) for q in ("Who counted?", "And then?", "Why?")])
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]
    assert answers[1][-1].retrieval.page_ids.shape[1] < answers[1][-1].retrieval.scores.shape[1]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_heads_that_choose_for_themselves(name: str) -> None:
    """In any chunking and any tier; the sets are others than those that heads share."""
    ids = random_ids(163)
    by_page = make(name, chunk_pages=1, selection_scope="head").logits(ids)
    for options in ({"chunk_pages": 5}, {"chunk_pages": 100, "device_kv_bytes": 20 * PAGE_BYTES}):
        assert (make(name, selection_scope="head", **options).logits(ids) - by_page).abs().max() <= 1e-6
    assert (make(name).logits(ids) - by_page).abs().max() > 1e-2


def test_heads_can_not_differ_in_how_many_tokens_they_choose() -> None:
    talk = make("llama", 600, selection_scope="head", kv_budget=64).read(STORY).conversation()
    with pytest.raises(UserError, match="KV heads chose pages of different lengths"):
        for question in ("Who counted?", "And then?", "Why?", "When?"):
            talk.ask(question, raw=True, max_new_tokens=5)


@pytest.mark.parametrize("num_slots", [8, 11, 20])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_capped_device_tier_changes_no_bit(name: str, num_slots: int) -> None:
    """Fewer slots than a chunk has pages, about as many, and more: always evicting."""
    ids = random_ids(300)
    resident = make(name)
    tiered = make(name, device_kv_bytes=num_slots * PAGE_BYTES)
    assert torch.equal(resident.logits(ids), tiered.logits(ids))
    out = [lm.generate(ids[None], max_new_tokens=12, do_sample=False) for lm in (resident, tiered)]
    assert torch.equal(*out)


def test_the_device_tier_hits_and_evicts() -> None:
    lm = make("llama", 600, device_kv_bytes=12 * PAGE_BYTES, chunk_pages=4, kv_budget=64)
    document = lm.read(STORY * 4)
    store = document.encoder.parts.store
    assert isinstance(store, TieredStore)
    assert document.num_pages > 30
    assert 0.5 < store.hit_rate < 1.0
    assert store.bytes().device <= 12 * PAGE_BYTES < store.bytes().host == store.num_used * PAGE_BYTES
    answer = document.ask("Who?", raw=True, max_new_tokens=2)
    assert answer.kv_bytes["device"] == store.bytes().device


def test_a_cap_too_small_is_refused_before_reading() -> None:
    with pytest.raises(UserError, match=f"device_kv_bytes={3 * PAGE_BYTES} holds 3 pages"):
        make("llama", device_kv_bytes=3 * PAGE_BYTES).logits(random_ids(100))


# --- poison --------------------------------------------------------------------------------------------------------


def slabs_of(store: PageStore, layer: int) -> list[tuple[Slabs, dict[int, int]]]:
    """All places where a layer's pages may lie: slabs, and which page stands where in them."""
    if isinstance(store, ResidentStore):
        return [(store._layers[layer], {page: page for page in range(store._capacity)})]
    assert isinstance(store, TieredStore)
    cache = store._tiers[layer]
    in_cache = {page: slot for slot, page in enumerate(cache._page_in.tolist()) if page >= 0}
    return [(store._host[layer], {page: page for page in range(store._capacity)}), (cache.slabs, in_cache)]


def poison(document: Document, kept: list[set[int]]) -> None:
    """Overwrite keys and values of all pages but those in `kept` (store pages by layer) with NaN, in every tier."""
    store = document.encoder.parts.store
    for layer, pages in enumerate(kept):
        for slabs, places in slabs_of(store, layer):
            ids = torch.tensor([place for page, place in places.items() if page not in pages], dtype=torch.int64)
            if len(ids):
                bad = torch.full((len(ids), W, 2, 12), torch.nan, dtype=torch.float64)
                slabs.write(ids, bad, bad)


@pytest.mark.parametrize("cap", [None, 12 * PAGE_BYTES])
@pytest.mark.parametrize("name", FAMILIES)
def test_unselected_pages_may_hold_anything(name: str, cap: int | None) -> None:
    lm = make(name, 600, device_kv_bytes=cap, kv_budget=64, agreement_layers=0)
    document = lm.read(STORY * 2)
    clean = document.ask("Who counted?", raw=True, max_new_tokens=10, do_sample=False)
    ids = document.table.ids.tolist()
    sinks = set(ids[: document.table.num_sink])  # bookmarks see them in sliding layers too
    kept = [sinks | {ids[page] for page in row if page >= 0} for row in clean.retrieval.page_ids.tolist()]
    assert all(len(pages) < len(ids) / 2 for pages in kept)
    poison(document, kept)
    again = document.ask("Who counted?", raw=True, max_new_tokens=10, do_sample=False)
    assert again.token_ids == clean.token_ids
    assert torch.equal(again.retrieval.page_ids, clean.retrieval.page_ids)
    assert torch.equal(again.retrieval.scores.nan_to_num(), clean.retrieval.scores.nan_to_num())


def test_a_poisoned_selected_page_shows() -> None:
    """The poison test can fail."""
    lm = make("llama", 600, kv_budget=64)
    document = lm.read(STORY)
    clean = document.ask("Who counted?", raw=True, max_new_tokens=5, do_sample=False)
    ids = document.table.ids.tolist()
    lost = ids[int(clean.retrieval.page_ids[2].max())]
    poison(document, [set(ids), set(ids), set(ids) - {lost}, set(ids)])
    again = document.ask("Who counted?", raw=True, max_new_tokens=5, do_sample=False)
    assert again.token_ids != clean.token_ids


@pytest.mark.parametrize("cap", [None, 9 * PAGE_BYTES])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-sliding"])
def test_memory_that_was_never_written_is_never_used(
    name: str, cap: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(157)
    clean = make(name, device_kv_bytes=cap).logits(ids)
    poison_new_memory(monkeypatch)
    assert torch.equal(make(name, device_kv_bytes=cap).logits(ids), clean)


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every slab with NaN as it grows."""
    grow = Slabs.grow

    def poisoned(self: Slabs, num_pages: int) -> None:
        grow(self, num_pages)
        for tensor in (*self._keys, *self._values):
            tensor.fill_(torch.nan)

    monkeypatch.setattr(Slabs, "grow", poisoned)


@pytest.mark.parametrize("store_dtype", ["bfloat16", "float16", "float32"])
def test_rounded_pages_are_the_same_in_every_tier(store_dtype: Any) -> None:
    """A page is rounded when it is finished, before any other page reads it."""
    ids = random_ids(150)
    found = [
        make("llama", store_dtype=store_dtype, chunk_pages=chunk_pages, device_kv_bytes=cap).logits(ids)
        for chunk_pages in (1, 7)
        for cap in (None, 9 * PAGE_BYTES)
    ]
    assert all((logits - found[0]).abs().max() <= 1e-6 for logits in found)
    assert not torch.equal(found[0], make("llama").logits(ids))


def test_own_reads_of_a_rounded_page_are_rounded_too() -> None:
    """The page itself attends what later pages will see."""
    ids = random_ids(W)
    rounded = make("llama", store_dtype="bfloat16").logits(ids)
    assert not torch.equal(rounded, make("llama").logits(ids))
