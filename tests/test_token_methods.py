"""Token methods against the naive ones: logits while reading and answering, what is attended, batches, threads."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import naive_tokens as naive
from grids import some
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.results import Answer
from retrolm.errors import UserError
from retrolm.methods import METHODS, BudgetError
from tiny_models import exact_model, random_ids, tiny_model

BUDGET, NEW = 40, 6
# Method → its knobs, and the naive rule that they stand for.
CASES: dict[str, tuple[dict[str, Any], Callable[[], naive.Rule]]] = {
    "streaming_llm": ({"num_sink": 3}, lambda: naive.Streaming(BUDGET, 3)),
    "lm_infinite": ({"num_global": 5}, lambda: naive.LMInfinite(BUDGET - 5, 5)),
    "h2o_streaming": ({"num_heavy": 15, "chunk": 9}, lambda: naive.H2O(BUDGET, 15)),
    "infllm": (
        {"num_init": 3, "window": 12, "block": 4, "top_k": 3, "unit": 5, "repr_top_k": 2},
        lambda: naive.InfLLM(3, 12, 4, 3, 2),
    ),
    "actqkv": (
        {"num_init": 3, "window": 12, "block": 4, "top_k": 3, "unit": 5, "repr_top_k": 2}
        | {"share": 0.8, "min_blocks": 1, "history": 5, "warm_up": 5, "temperature": 0.05},
        lambda: naive.ActQKV((3, 12, 4, 3, 2), 1, 0.8, 5, 0.05),
    ),
    "tokenselect": ({"num_init": 4, "num_local": 8, "chunk": 7}, lambda: naive.TokenSelect(BUDGET, 4, 8)),
    "quest": ({"page": 8, "num_dense_layers": 1}, lambda: naive.Quest(BUDGET, 8, 1)),
    "arkvale": ({"page": 4, "num_dense_layers": 1}, lambda: naive.ArkVale(BUDGET, 4, 1)),
    "retrieval_attention": ({"num_first": 3, "num_recent": 9}, lambda: naive.RetrievalAttention(BUDGET, 3, 9)),
    "razor_attention": (
        {"num_sink": 3, "num_random": 9, "repeats": 3, "induction_share": 0.25, "echo_share": 0.125},
        lambda: naive.Razor(BUDGET, 3, 9, 3, (0.25, 0.125)),
    ),
    "shadowkv": (
        {"chunk": 4, "num_local": 2, "rank": 10, "outliers": 0.2},
        lambda: naive.ShadowKV(BUDGET, 4, 2, 10, 2),
    ),
}
FAMILIES = ["llama", "llama-mha", "llama-mqa", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "mistral-sliding"]


def engine(name: str, model: Any, kv_budget: int = BUDGET, **knobs: Any) -> RetroLM:
    config = RetroConfig(kv_budget=kv_budget, page_size=8)
    return RetroLM(model, config=config, method=name, method_options=knobs or CASES[name][0])


def prompt(ids: Tensor) -> Prompt:
    return Prompt((), tuple(ids[:-4].tolist()), tuple(ids[-4:].tolist()))


class Logits:
    """A logits processor that keeps what it sees: one [B, vocabulary] per step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.clone())
        return scores


def ask(lm: RetroLM, ids: list[Tensor]) -> tuple[list[Answer], list[Tensor]]:
    """Answers, and their logits by step."""
    seen = Logits()
    prompts = [prompt(row) for row in ids]
    answers = lm.answer(prompts, max_new_tokens=NEW, do_sample=False, logits_processor=[seen], eos_token_id=None)
    return answers, seen.steps


def read_naively(model: Any, rule: naive.Rule, ids: list[int], chunk: int, answer: list[int]) -> naive.NaiveTokens:
    """Chunks of the prompt but its last token, then one token at a time."""
    reader, rule.question = naive.NaiveTokens(model, rule), tuple(ids[-4:])
    for start in range(0, len(ids) - 1, chunk):
        reader.chunk(ids[start : min(start + chunk, len(ids) - 1)])
    for token in [ids[-1], *answer[:-1]]:
        reader.chunk([token], answering=True)
    return reader


@pytest.mark.parametrize(("name", "family"), some(list(CASES), FAMILIES, each=2))
def test_methods_equal_their_naive_selves(name: str, family: str) -> None:
    """Logits of every answer step, and what each layer attended, in reading and in each step."""
    model, ids = exact_model(family, seed=3), random_ids(64, seed=5)
    lm = engine(name, model)
    (answer,), steps = ask(lm, [ids])
    chunk = lm.method.chunk_tokens(BUDGET)  # type: ignore[attr-defined]
    reader = read_naively(model, CASES[name][1](), ids.tolist(), chunk, list(answer.token_ids))
    expected = np.stack(reader.logits[len(ids) - 1 :])
    found = torch.cat(steps).numpy()
    assert np.abs(found - expected).max() < 2e-6
    prefill = [max(layer[: len(ids) - 1]) for layer in reader.counts]
    decode = [max(layer[len(ids) - 1 :]) for layer in reader.counts]
    assert list(answer.attended_by_layer["prefill"]) == prefill
    assert list(answer.attended_by_layer["decode"]) == decode


@pytest.mark.parametrize("name", list(CASES))
def test_reading_gives_the_naive_logits(name: str) -> None:
    model, ids = exact_model("qwen2", seed=1), random_ids(57, seed=2)
    lm = engine(name, model)
    chunk = lm.method.chunk_tokens(BUDGET)  # type: ignore[attr-defined]
    reader = naive.NaiveTokens(model, CASES[name][1]())
    for start in range(0, len(ids), chunk):
        reader.chunk(ids[start : start + chunk].tolist())
    assert np.abs(lm.logits(ids).numpy() - np.stack(reader.logits)).max() < 2e-6


@pytest.mark.parametrize("name", list(CASES))
def test_the_budget_holds_at_every_step(name: str) -> None:
    """Counted where attention is computed, layer by layer and step by step; dense layers are told apart."""
    lm = engine(name, tiny_model("llama"))
    counts: list[list[list[list[int]]]] = []
    program = lm.program
    stock = program._answers  # type: ignore[attr-defined]

    def spy(batch: Any, found: Any) -> Any:
        counts.append(batch.decode_counts(found.num_steps))
        return stock(batch, found)

    program._answers = spy  # type: ignore[attr-defined]
    answers, _ = ask(lm, [random_ids(90), random_ids(70, seed=1)])
    dense = lm.method.dense_layers(4)  # type: ignore[attr-defined]
    for layer, steps in enumerate(counts[0]):
        assert len(steps) == NEW
        for number, step in enumerate(steps):
            wanted = [90 + number, 70 + number] if layer in dense else [BUDGET, BUDGET]
            assert all(seen <= most for seen, most in zip(step, wanted, strict=True))
            assert layer not in dense or step == wanted
    assert all(answer.attended_tokens["decode"] <= BUDGET for answer in answers)
    assert ("dense_layers" in answers[0].attended_tokens) == bool(dense)


@pytest.mark.parametrize(("name", "family"), some(list(CASES), ["llama", "gemma3", "mistral-sliding"], each=1))
def test_a_batch_gives_what_its_prompts_give_alone(name: str, family: str) -> None:
    lm = engine(name, tiny_model(family))
    rows = [random_ids(length, seed=length) for length in (73, 9, 1 + BUDGET, 73, 50)]
    together, steps = ask(lm, rows)
    for number, ids in enumerate(rows):
        (alone,), own = ask(lm, [ids])
        assert together[number].token_ids == alone.token_ids
        assert together[number].attended_tokens == alone.attended_tokens
        assert together[number].kv_bytes == alone.kv_bytes
        assert (torch.stack(steps)[:, number] - torch.cat(own)).abs().max() < 1e-9


@pytest.mark.parametrize("name", list(CASES))
def test_nothing_leaks_between_samples_or_threads(name: str) -> None:
    model = tiny_model("qwen2")
    engines = [engine(name, model), engine(name, model)]
    rows = [random_ids(80, seed=seed) for seed in range(2)]
    before = [ask(engines[0], [ids])[1] for ids in rows]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = ask(engines[number], [rows[number]])[1]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert torch.equal(torch.cat(found[number]), torch.cat(before[number]))


@pytest.mark.parametrize("name", ["streaming_llm", "lm_infinite"])
def test_chunking_does_not_change_what_has_no_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, ids = engine(name, exact_model("llama")), random_ids(90)
    found = []
    for size in (1, 7, 512):
        monkeypatch.setattr(type(lm.method), "chunk_tokens", lambda self, budget, size=size: size)
        found.append(lm.logits(ids))
    assert (found[0] - found[1]).abs().max() < 1e-9 and (found[0] - found[2]).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["streaming_llm", "lm_infinite", "h2o_streaming"])
def test_evicted_tokens_free_their_memory(name: str) -> None:
    lm = engine(name, tiny_model("llama"))
    (answer,), _ = ask(lm, [random_ids(200)])
    row_bytes = 2 * lm.backbone.num_kv_heads * lm.backbone.head_dim * 8
    assert answer.kv_bytes["device"] <= (BUDGET + 1) * lm.backbone.num_layers * row_bytes


def test_attending_everything_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = engine("streaming_llm", tiny_model("llama"))
    monkeypatch.setattr(type(lm.method), "select", lambda self, view: None)
    monkeypatch.setattr(type(lm.method), "keep", lambda self, *_: None)
    with pytest.raises(BudgetError, match="attended 95 tokens of a text of 90; its budget is 40"):
        ask(lm, [random_ids(90)])


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("streaming_llm", {"num_sinks": 4}, "Did you mean 'num_sink'"),
        ("streaming_llm", {"num_sink": "4"}, "must be a whole number"),
        ("streaming_llm", {"num_sink": True}, "must be a whole number"),
        ("streaming_llm", {"num_sink": 0}, "at least 1"),
        ("streaming_llm", {"num_sink": 40}, "kv_budget=40 is too small for streaming_llm"),
        ("infllm", {"window": 38}, "kv_budget=40 is too small for infllm"),
        ("tokenselect", {"num_local": 40}, "kv_budget=40 is too small for tokenselect"),
        ("quest", {"page": 16}, "three pages"),
        ("arkvale", {"page": 16}, "two last ones"),
        ("retrieval_attention", {"num_recent": 40}, "one to find"),
        ("recency", {"num_sink": 4}, "has no knobs"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(name: str, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine(name, tiny_model("llama"), **knobs)


def test_several_sequences_are_refused() -> None:
    lm = engine("streaming_llm", tiny_model("llama"))
    with pytest.raises(UserError, match="one sequence per prompt"):
        lm.answer([prompt(random_ids(20))], max_new_tokens=2, num_beams=2)


def test_every_token_method_is_tested_here() -> None:
    elsewhere = {"quest_retro", "arkvale_retro", "token_sparse"}  # test_retro_attention.py, test_token_sparse.py
    assert {name for name in METHODS if METHODS.get(name).kind == "tokens"} == set(CASES) | elsewhere


@pytest.mark.parametrize("kv_budget", [96, 512, 1024, 2048, 6144])
@pytest.mark.parametrize("name", list(CASES))
def test_defaults_can_be_served_from_every_common_budget(name: str, kv_budget: int) -> None:
    method = METHODS.get(name)()
    method.check_budget(kv_budget)
    assert 1 <= method.chunk_tokens(kv_budget) <= 512  # type: ignore[attr-defined]


def test_splits_of_2k_and_6k() -> None:
    """First, window, block, chosen blocks, unit; and first, local, chunk of TokenSelect."""
    infllm, selecting = METHODS.get("infllm")(), METHODS.get("tokenselect")()
    splits = [dataclasses.astuple(infllm._split(budget)) for budget in (2048, 6144)]  # type: ignore[attr-defined]
    assert splits == [(128, 769, 128, 7, 128), (128, 2817, 128, 23, 128)]
    assert dataclasses.astuple(selecting._split(2048)) == (128, 512, 512)  # type: ignore[attr-defined]


def test_tokenselect_pools_votes_and_reuses_queries() -> None:
    model, ids = tiny_model("llama"), random_ids(90)
    knobs = CASES["tokenselect"][0]
    plain = engine("tokenselect", model, **knobs).logits(ids)
    pooled = engine("tokenselect", model, **knobs, pool=3).logits(ids)
    kept = engine("tokenselect", model, **knobs, reuse=-1.0).logits(ids)
    alike = engine("tokenselect", model, **knobs, reuse=0.999999).logits(ids)
    assert (plain - pooled).abs().max() > 1e-3 and (plain - kept).abs().max() > 1e-3
    assert torch.equal(plain, alike)
