"""A model whose layers stand on two GPUs reads, chooses and answers as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.methods import METHODS
from test_against_naive import random_retriever
from tiny_folder import save_tiny_model
from tiny_models import random_ids, stock_logits, tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("exact_matmul"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

W, BUDGET, BAR = 8, 40, 1e-4
# Layers of a model on one GPU are fused: a last bit can move a quantised number by a step.
QUANTISED_BAR = 0.05
SLOTS = 12  # pages of each layer in the device tier, where it is capped
FAMILIES = ["llama", "mistral-sliding", "qwen2", "qwen3", "phi3-longrope", "gemma2", "gemma3"]
STORES: dict[str, dict[str, Any]] = {
    "resident": {},
    "tiered": {
        "device_kv_bytes": SLOTS * 2 * W * 2 * 12 * 4 * 4
    },  # K and V, tokens, KV heads, head dim, float32, layers
    "8 bits": {"store_bits": 8},
    "tiered, 8 bits": {"store_bits": 8, "device_kv_bytes": SLOTS * 2 * W * 2 * 12 * 4 * 4},
}


def split(model: Any) -> Any:
    """The layers in turn on either GPU: what is tied stays together, the last norm is elsewhere than the embeddings."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 0}
    places |= {f"model.layers.{i}": (i + 1) // 2 % 2 for i in range(len(model.model.layers))}
    return dispatch_model(model, places)


def make(name: str, how: str, method: str = "retrolm", vocab_size: int = 128, **options: Any) -> RetroLM:
    """An engine on one GPU, on two, or on the second alone; with 600 words it has a tokenizer."""
    model = tiny_model(name, dtype=torch.float32, vocab_size=vocab_size)
    model = split(model) if how == "split" else model.to({"one": "cuda:0", "second": "cuda:1"}[how])
    config = RetroConfig.from_options({"kv_budget": BUDGET, "page_size": W, **options})
    lm = RetroLM(model, tiny_tokenizer() if vocab_size == 600 else None, config=config, method=method)
    if lm.method.needs_bookmarks:
        lm.use_retriever(random_retriever(lm, 4))
    assert len({info.device for info in lm.backbone.layers}) == (2 if how == "split" else 1)
    return lm


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.cpu() - b.cpu()).abs().max())


def greedy(lm: RetroLM, ids: Tensor, **options: Any) -> list[list[int]]:
    found: list[list[int]] = lm.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[], **options).tolist()
    return found


@pytest.mark.parametrize("store", list(STORES))
@pytest.mark.parametrize("name", FAMILIES)
def test_reading_and_generating_equal_one_gpu(name: str, store: str) -> None:
    ids = random_ids(300)
    one, two = (make(name, how, **STORES[store]) for how in ("one", "split"))
    assert difference(one.logits(ids), two.logits(ids)) <= (QUANTISED_BAR if "bits" in store else BAR)
    rows = torch.stack([random_ids(150, seed) for seed in range(2)]).cuda()
    if "bits" not in store:
        assert greedy(one, rows) == greedy(two, rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_budget_that_holds_the_text_equals_the_stock_model_on_one_gpu(name: str) -> None:
    ids = random_ids(133).cuda()
    stock = stock_logits(tiny_model(name, dtype=torch.float32).cuda(), ids)
    for bypass in (False, True):
        assert difference(make(name, "split", kv_budget=160, dense_bypass=bypass).logits(ids), stock) <= BAR


@pytest.mark.parametrize("store", list(STORES))
def test_questions_choose_the_same_pages_and_are_answered_alike(store: str) -> None:
    found = []
    for how in ("one", "split"):
        lm = make("llama", how, vocab_size=600, kv_budget=64, **STORES[store])
        document = lm.read(STORY * 3)
        answers = document.ask(["Who counted?", "And why?"], raw=True, max_new_tokens=8)
        talk = document.conversation()
        turns = [talk.ask(question, raw=True, max_new_tokens=5) for question in ("Who counted?", "And then?")]
        chosen = document.retrieve("Who counted?", raw=True)
        found.append((chosen, [(one.token_ids, one.retrieval.page_ids.tolist()) for one in (*answers, *turns)]))
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][0].page_ids, found[1][0].page_ids)
    assert torch.allclose(found[0][0].scores, found[1][0].scores, rtol=BAR, atol=BAR, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {"causal_selection": True},
        {"score_rope": True},
        {"first_layer_mode": "mean_key"},
        {"first_layer_mode": "full"},
        {"selection_scope": "head"},
        {"retrieve_every": 5},
    ],
    ids=str,
)
def test_options_equal_one_gpu(options: dict[str, Any]) -> None:
    ids = random_ids(200)
    one, two = (make("qwen2", how, **options) for how in ("one", "split"))
    assert difference(one.logits(ids), two.logits(ids)) <= BAR
    assert greedy(one, ids[None].cuda()) == greedy(two, ids[None].cuda())


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS.get(name).kind in ("pages", "tokens", "prune")])
def test_methods_equal_one_gpu(method: str) -> None:
    found = []
    for how in ("one", "split"):
        lm = make("llama", how, method, kv_budget=96)
        prompts = [Prompt((), tuple(random_ids(n, n).tolist()), (7, 8, 9)) for n in (150, 60)]
        answers = lm.answer(prompts, max_new_tokens=6, do_sample=False, eos_token_id=None)
        found.append([(answer.token_ids, answer.attended_by_layer) for answer in answers])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_captured_step_gives_way_to_generate(name: str) -> None:
    ids = random_ids(150)[None].cuda()
    two = make(name, "split", vocab_size=600)
    expected = greedy(make(name, "one", vocab_size=600), ids, decoding="plain")
    assert greedy(two, ids, decoding="auto") == greedy(two, ids, decoding="plain") == expected
    answer = two.read(STORY).ask("Who?", raw=True, max_new_tokens=3, decoding="auto")
    assert answer.decode_path == "generate (the layers are on several devices)"
    with pytest.raises(UserError, match="can't be had here: the layers are on several devices"):
        greedy(two, ids, decoding="fast")


@pytest.mark.parametrize("decoding", ["plain", "fast"])
@pytest.mark.parametrize("store", list(STORES))
def test_the_second_gpu_alone_does_what_the_first_does(store: str, decoding: str) -> None:
    """Streams, kernels and graphs belong to the current device, which is the first."""
    assert torch.cuda.current_device() == 0
    ids = random_ids(200)
    first, second = (make("llama", how, **STORES[store]) for how in ("one", "second"))
    assert difference(first.logits(ids), second.logits(ids)) <= BAR
    rows = torch.stack([ids, random_ids(200, 1)])
    assert greedy(first, rows.cuda(), decoding=decoding) == greedy(second, rows.to("cuda:1"), decoding=decoding)


@pytest.mark.parametrize("places", ["by hand", "balanced", "auto"])
def test_device_map_of_from_pretrained(places: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    by_hand = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1}
    by_hand |= {"model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    options: dict[str, Any] = {"kv_budget": 64, "page_size": W, "dtype": "float32"}
    one = RetroLM.from_pretrained(folder, device_map={"": 0}, **options)
    other = RetroLM.from_pretrained(folder, device_map=by_hand if places == "by hand" else places, **options)
    if places == "by hand":
        assert {info.device.index for info in other.backbone.layers} == {0, 1}
    ids = random_ids(120)
    assert difference(one.logits(ids), other.logits(ids)) <= BAR
    answers = [lm.read(STORY).ask("Who counted?", raw=True, max_new_tokens=8) for lm in (one, other)]
    assert answers[0].token_ids == answers[1].token_ids
