"""The engine's key equalities on a GPU, and that no layer of a reading pass waits for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.engine.page_rows import PageRows
from retrolm.engine.prefill import PrefillProgram
from test_against_naive import random_retriever
from tiny_models import MODELS, ORIGINAL, random_ids, stock_logits, tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_matmul")]

W, BUDGET = 8, 40
PAGE_BYTES = 2 * W * 2 * 12 * 8 * 4  # K and V, tokens, KV heads, head dim, float64, layers
FAMILIES = ["llama", "mistral-sliding", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"]


def make(
    name: str,
    dtype: torch.dtype = torch.float64,
    device: str = "cuda",
    method: str = "retrolm",
    vocab_size: int = 128,
    **options: Any,
) -> RetroLM:
    """An engine with a random retriever; with 600 words it has a tokenizer."""
    config = RetroConfig.from_options({"kv_budget": BUDGET, "page_size": W, **options})
    model = tiny_model(name, dtype=dtype, vocab_size=vocab_size).to(device)
    lm = RetroLM(model, tiny_tokenizer() if vocab_size == 600 else None, config=config, method=method)
    if lm.method.needs_bookmarks:
        lm.use_retriever(random_retriever(lm, 4))
    return lm


def largest(a: Tensor, b: Tensor) -> float:
    return float((a.double().cpu() - b.double().cpu()).abs().max())


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_a_budget_that_holds_the_text_equals_the_stock_model(
    name: str, dtype: torch.dtype, bar: float, bypass: bool
) -> None:
    ids = random_ids(17 * W - 1 + (ORIGINAL if name == "phi3-longrope" else 0)).cuda()
    model = tiny_model(name, dtype=dtype).cuda()
    config = RetroConfig(kv_budget=200, page_size=W, chunk_pages=7, dense_bypass=bypass)
    assert largest(RetroLM(model, config=config).logits(ids), stock_logits(model, ids)) <= bar


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_chunking_gives_the_same_logits(name: str, causal: bool) -> None:
    """And near enough the processor's: angles are float32, and a device rounds them its own way."""
    ids = random_ids(163)
    by_page = make(name, chunk_pages=1, causal_selection=causal).logits(ids)
    assert largest(by_page, make(name, device="cpu", chunk_pages=1, causal_selection=causal).logits(ids)) <= 1e-4
    for chunk_pages in (5, 100):
        assert largest(make(name, chunk_pages=chunk_pages, causal_selection=causal).logits(ids), by_page) <= 1e-6


@pytest.mark.parametrize("num_slots", [8, 20])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_capped_device_tier_changes_nothing(name: str, num_slots: int) -> None:
    ids = random_ids(300)
    resident, tiered = make(name), make(name, device_kv_bytes=num_slots * PAGE_BYTES)
    assert largest(resident.logits(ids), tiered.logits(ids)) == 0.0
    out = [lm.generate(ids[None].cuda(), max_new_tokens=12, do_sample=False) for lm in (resident, tiered)]
    assert torch.equal(*out)


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_at_true_distances_are_answered_as_on_a_processor(name: str) -> None:
    """A batch of texts of several lengths: the captured loop there, `generate` here."""
    rows = [random_ids(n, n) for n in (163, 30, 131)]
    found = []
    for device in ("cuda", "cpu"):
        lm = make(name, device=device, page_positions="true")
        documents = lm.read(rows)
        asked = [(document, random_ids(5, 5).tolist()) for document in documents]
        found.append([answer.token_ids for answer in lm.ask_batch(asked, max_new_tokens=12, eos_token_id=None)])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_words_choose_pages_as_on_a_processor(name: str) -> None:
    """The words are counted on the host, what the layers agree on lies on the device."""
    texts = [STORY * 4 + "The key of the red house is 4711. " + STORY, STORY * 2]
    found = []
    for device in ("cuda", "cpu"):
        lm = make(name, device=device, vocab_size=600, kv_budget=20 * W, agreement_layers=1, word_weight=2.0)
        asked = [(lm.read(text), "What is the key of the red house?") for text in texts]
        found.append([answer.token_ids for answer in lm.ask_batch(asked, max_new_tokens=12)])
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-sliding", "gemma3"])
def test_half_precision_under_forced_selections(name: str, dtype: torch.dtype) -> None:
    """The method "random" chooses by a hash, whatever the numbers, so that only rounding is left to differ."""
    ids = random_ids(163)
    exact = make(name, torch.float64, "cpu", "random").logits(ids)
    assert largest(make(name, dtype, method="random").logits(ids), exact) <= 0.5


# --- nothing waits ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every wait for the device inside a layer's attention or projections an error."""

    def forbid(name: str) -> None:
        stock = getattr(PrefillProgram, name)

        def watched(self: PrefillProgram, *args: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return stock(self, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(PrefillProgram, name, watched)

    forbid("attend")
    forbid("project")


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_layer_waits_for_the_device(name: str, bypass: bool, no_waiting: None) -> None:
    make(name, torch.bfloat16, dense_bypass=bypass, chunk_pages=6).logits(random_ids(200))


@pytest.mark.parametrize(
    "options",
    [
        {"causal_selection": True},
        {"score_rope": True},
        {"first_layer_mode": "mean_key"},
        {"first_layer_mode": "full"},
        {"num_local_pages": 0},
        {"selection_scope": "head"},
        {"page_positions": "true"},
        {"method": "mean_key"},
        {"method": "quest_pages"},
        {"method": "random"},
    ],
    ids=str,
)
def test_no_option_makes_a_layer_wait(options: dict[str, Any], no_waiting: None) -> None:
    make("llama", torch.bfloat16, **options).logits(random_ids(200))


@pytest.mark.parametrize("positions", ["compact", "ranked_for_questions", "true_for_questions", "true"])
def test_questions_and_turns_do_not_wait(positions: str, no_waiting: None) -> None:
    """Behind turns stand short pages: only the device knows whether they were chosen."""
    lm = make("llama", torch.float32, vocab_size=600, kv_budget=64, page_positions=positions)
    talk = lm.read(STORY).conversation()
    for question in ("Who counted?", "And then?", "Why?"):
        talk.ask(question, raw=True, max_new_tokens=5)


def test_a_wait_would_show(no_waiting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = PageRows.by_page
    monkeypatch.setattr(PageRows, "by_page", lambda self, packed: stock(self, packed * float(packed.sum() * 0 + 1)))
    with pytest.raises(RuntimeError, match="synchroniz"):
        make("llama", torch.float32).logits(random_ids(100))
