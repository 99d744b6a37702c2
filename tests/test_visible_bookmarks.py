"""Visible bookmarks (D1 a): tokens see the bookmarks of the pages they attend, against the naive implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.engine.text_loss import sparse_program
from retrolm.engine.verify import verify
from retrolm.errors import IncompatibleRetrieverError, UserError
from test_against_naive import (
    TOLERANCE,
    Recorder,
    W,
    check_answer,
    check_reading,
    cut,
    pair,
    random_retriever,
)
from test_invariance import poison_new_memory
from tiny_models import random_ids, tiny_model, wide_softmax
from tiny_tokenizer import STORY, tiny_tokenizer

BUDGET = 4 * (W + 1)


def visible(name: str, **options: Any) -> Any:
    return pair(name, **{"kv_budget": BUDGET, "bookmarks": "visible", **options})


@pytest.mark.parametrize("name", ["llama-mqa", "llama-yarn", "mistral-sliding", "qwen3", "phi3", "gemma2", "gemma3"])
def test_every_family(name: str) -> None:
    check_reading(*visible(name), num_tokens=60)


@pytest.mark.parametrize(
    "options",
    [
        {"strict_budget": False},
        {"num_local_pages": 0},
        {"bookmark_span": "page"},
        {"first_layer_mode": "mean_key", "num_skip_layers": 2},
        {"first_layer_mode": "full"},
        {"causal_selection": True, "score_rope": True},
        {"selection_scope": "head"},
        {"dense_bypass": False},
        {"kv_budget": BUDGET + 5},
        {"page_size": 7, "kv_budget": 40},
        {"page_size": 1, "kv_budget": 11},
        {"chunk_pages": 1},
    ],
    ids=str,
)
def test_every_option(options: dict[str, Any]) -> None:
    check_reading(*visible("qwen2", **options), num_tokens=6 * options.get("page_size", W) + 11)


@pytest.mark.parametrize(
    ("name", "question_tokens"),
    [("llama", 1), ("llama", W), ("llama", W + 1), ("qwen2", 5), ("gemma2", 2 * W + 3), ("gemma3", 5), ("phi3", W)],
)
def test_question_page_and_decoding(name: str, question_tokens: int) -> None:
    """The answer sees the bookmarks of the pages it attends, not that of its own question."""
    lm, naive = visible(name, kv_budget=6 * (W + 1))
    question = random_ids(question_tokens, 5).tolist()
    query, page = check_answer(lm, naive, question)
    attended = len(question) + sum(len(naive.pages[i].tokens) + 1 for i in page.selected[1])
    assert query.choices[1].attended_tokens == attended <= 6 * (W + 1)
    assert query.peak_decode == attended + 11


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_turns_of_a_conversation_are_pages_with_bookmarks(name: str) -> None:
    """With room for everything; a question longer than a page keeps its one bookmark, behind its last token."""
    lm, naive = visible(name, kv_budget=300)
    text, first, second = random_ids(67).tolist(), random_ids(2 * W + 3, 5).tolist(), random_ids(6, 7).tolist()
    recorder = Recorder()
    options = {"do_sample": False, "max_new_tokens": 11, "eos_token_id": None, "logits_processor": [recorder]}
    with wide_softmax():
        talk = lm.read(torch.tensor(text)).conversation()
        answers = [list(talk.ask(question, **options).token_ids) for question in (first, second)]
    naive.read(cut(text))
    for page in (first, *cut(answers[0])):
        naive.ask(page, [])
    page = naive.ask(second, answers[1])
    expected = torch.from_numpy(page.logits[len(second) - 1 : -1])
    assert (torch.cat(recorder.logits[11:]) - expected).abs().max() <= TOLERANCE


def make(name: str, vocab_size: int = 128, **options: Any) -> RetroLM:
    settings = {"kv_budget": 45, "page_size": W, "bookmarks": "visible", **options}
    tokenizer = tiny_tokenizer() if vocab_size == 600 else None
    lm = RetroLM(tiny_model(name, vocab_size=vocab_size), tokenizer, config=RetroConfig.from_options(settings))
    lm.use_retriever(random_retriever(lm, 4))
    return lm


PAGE_BYTES = 2 * (W + 1) * 2 * 12 * 8 * 4  # K and V, tokens and bookmark, KV heads, head dim, float64, layers


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("gemma2", {"causal_selection": True}), ("mistral-sliding", {"selection_scope": "head"})],
)
def test_neither_chunks_nor_tiers_change_a_result(name: str, options: dict[str, Any]) -> None:
    ids = random_ids(115)
    by_page = make(name, chunk_pages=1, **options).logits(ids)
    for more in ({"chunk_pages": 5}, {"chunk_pages": 100, "device_kv_bytes": 11 * PAGE_BYTES}, {"dense_bypass": False}):
        assert (make(name, **options, **more).logits(ids) - by_page).abs().max() <= 1e-6
    assert (make(name, **options, bookmarks="invisible").logits(ids) - by_page).abs().max() > 1e-2


@pytest.mark.parametrize("stored", [{"store_bits": 8}, {"store_bits": 4}, {"store_dtype": "bfloat16"}], ids=str)
def test_rounded_pages_are_the_same_in_every_tier(stored: dict[str, Any]) -> None:
    ids = random_ids(103)
    cap = make("llama", **stored).page_layout().page_bytes * 4 * 9
    tiers = ({"chunk_pages": 1}, {"chunk_pages": 7}, {"chunk_pages": 7, "device_kv_bytes": cap})
    found = [make("llama", **stored, **tier).logits(ids) for tier in tiers]
    assert all((logits - found[0]).abs().max() <= 1e-6 for logits in found)
    assert (found[0] - make("llama").logits(ids)).abs().max() > 1e-5


def test_documents_and_questions_in_batches(tmp_path: Path) -> None:
    """Ragged texts and questions, also with pages on disk, as one at a time."""
    texts, questions = [STORY, STORY[:150]], ["Who counted?", "Where did the ship go in the end?"]
    lm = make("llama", 600, kv_budget=108)
    single = [lm.read(text).ask(question, max_new_tokens=5) for text in texts for question in questions]
    lm.use_disk_tier(tmp_path, 20 * PAGE_BYTES)
    documents = lm.read(texts)
    pairs = [(document, question) for document in documents for question in questions]
    for one, other in zip(single, lm.ask_batch(pairs, max_new_tokens=5), strict=True):
        assert one.token_ids == other.token_ids
        assert torch.equal(one.retrieval.page_ids, other.retrieval.page_ids)
        assert one.attended_tokens["decode"] == other.attended_tokens["decode"] <= 108 + 4
    plain = make("llama", 600, kv_budget=108, bookmarks="invisible").read(texts)
    for ours, theirs in zip(documents, plain, strict=True):
        assert ours.page_spans == theirs.page_spans and ours.num_tokens == theirs.num_tokens
    assert {ours.num_tokens for ours in documents} != {ours.table.num_tokens for ours in documents}


@pytest.mark.parametrize("retrieve_every", [0, 5])
def test_the_engines_own_loop_and_generate_agree(retrieve_every: int) -> None:
    lm, ids = make("llama", kv_budget=64, retrieve_every=retrieve_every), random_ids(141)[None]
    fast, plain = (
        lm.generate(ids, max_new_tokens=17, do_sample=False, decoding=way, eos_token_id=None)
        for way in ("fast", "plain")
    )
    assert fast.tolist() == plain.tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_memory_that_was_never_written_is_never_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(109)
    clean = make(name).logits(ids)
    poison_new_memory(monkeypatch)
    assert torch.equal(make(name).logits(ids), clean)


def test_unselected_pages_and_their_bookmarks_may_hold_anything() -> None:
    lm = make("llama", 600, kv_budget=72, agreement_layers=0)
    document = lm.read(STORY * 2)
    clean = document.ask("Who counted?", raw=True, max_new_tokens=10, do_sample=False)
    ids, store = document.table.ids.tolist(), document.encoder.parts.store
    for layer, chosen in enumerate(clean.retrieval.page_ids.tolist()):
        lost = torch.tensor([page for number, page in enumerate(ids) if number not in chosen])
        assert len(lost) > len(ids) / 2
        bad = torch.full((len(lost), W + 1, 2, 12), torch.nan, dtype=torch.float64)
        store.write(layer, lost, bad, bad)
    again = document.ask("Who counted?", raw=True, max_new_tokens=10, do_sample=False)
    assert again.token_ids == clean.token_ids
    seen = torch.tensor([ids[max(clean.retrieval.page_ids[2].tolist())]])
    keys, values = store.read(2, seen)
    values[:, -1] = torch.nan  # a bookmark that is seen
    store.write(2, seen, keys, values)
    assert document.ask("Who counted?", raw=True, max_new_tokens=10, do_sample=False).token_ids != clean.token_ids


@pytest.mark.parametrize("method", ["mean_key", "snapkv", "full", "infllm"])
def test_methods_without_bookmarks_are_refused(method: str) -> None:
    with pytest.raises(UserError, match=f"'{method}' encodes no bookmarks"):
        RetroLM(tiny_model("llama"), config=RetroConfig(bookmarks="visible", kv_budget=512), method=method)


def test_what_knows_only_invisible_bookmarks_says_so() -> None:
    lm = make("llama")
    with pytest.raises(UserError, match="Comparing with the stock model works with invisible bookmarks alone"):
        verify(lm, random_ids(100))
    with pytest.raises(UserError, match="whole text in one pass works with invisible bookmarks alone"):
        sparse_program(lm, lm.config, 100)
    with pytest.raises(UserError, match=r"3 pages of 129 tokens.*each with its bookmark\). Use at least 387"):
        RetroConfig(kv_budget=384, bookmarks="visible")


@pytest.mark.parametrize(
    ("trained", "used", "message"),
    [
        ({"bookmarks": "visible"}, {"bookmarks": "invisible"}, "bookmarks='visible', this.*bookmarks='invisible'"),
        ({"bookmark_span": "page"}, {}, "bookmarks='invisible', bookmark_span='page', this"),
        ({"score_rope": True}, {"bookmarks": "invisible"}, "score_rope=True, this engine is set up with score_rope=Fa"),
    ],
)
def test_a_retriever_trained_otherwise_is_refused(
    trained: dict[str, Any], used: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lm = make("llama", **used)
    retriever = random_retriever(lm, 2)
    retriever.card.details["recipe"] = {"train": trained}
    folder = retriever.save(tmp_path)
    with pytest.raises(IncompatibleRetrieverError, match=message):
        lm.use_retriever(folder)
    make("llama", **{"bookmarks": "invisible", **trained}).use_retriever(folder)
