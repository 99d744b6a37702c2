"""Methods that prune after a dense prefill, against loops over written-out attention matrices."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from grids import pairs, some
from naive_prune import (
    h2o_places,
    in_window,
    slides,
    slow_forward,
    snapkv_places,
    streaming_places,
    tova_places,
)
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.prune import Pruned, generate_pruned
from retrolm.engine.prune_pass import PrunePass, PrunePrompt
from retrolm.engine.stock import stock_answers
from retrolm.errors import UserError
from retrolm.evaluation.variants import Variant
from retrolm.methods import METHODS, BudgetError
from retrolm.methods.prune_base import PromptStates, PruneMethod
from retrolm.ops import causal
from tiny_eval import run_stories
from tiny_models import exact_model, random_ids, tiny_model, wide_softmax

NAMES = [name for name in METHODS if METHODS.get(name).kind == "prune"]
BUDGET = 16
ANSWER = [7, 90, 33, 12]
SMALL = {"num_hidden_layers": 3}
Places = Callable[[list[list[list[float]]], int, int], list[set[int]]]


class Forced(LogitsProcessor):
    """Makes a given answer come out."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = iter(answer)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = next(self.answer)
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


def method(name: str, **knobs: Any) -> PruneMethod:
    if name in ("snapkv", "pyramidkv"):
        knobs = {"observation_window": 4, "pool_size": 3, **knobs}
    found = METHODS.get(name).with_options(knobs)
    assert isinstance(found, PruneMethod)
    return found


def engine(model: Any, budget: int = BUDGET, name: str = "full") -> RetroLM:
    return RetroLM(model, config=RetroConfig(kv_budget=budget, page_size=4), method=name)


def run(
    lm: RetroLM,
    chosen: PruneMethod,
    prompts: list[list[int]],
    budget: int = BUDGET,
    num_question: int = 6,
    new: int = 4,
) -> tuple[list[Pruned], Tensor]:
    """Answers with `ANSWER` forced, and the logits [step, sample, vocabulary]."""
    rows, logits = [PrunePrompt(ids, num_question) for ids in prompts], list[Tensor]()
    # Not from a logits processor: generate hands those float32.
    handle = lm.model.register_forward_hook(lambda module, args, out: logits.append(out.logits[:, -1]))
    options = {"max_new_tokens": new, "do_sample": False, "logits_processor": [Forced(ANSWER * new)]}
    try:
        return generate_pruned(lm, chosen, rows, kv_budget=budget, **options), torch.stack(logits)
    finally:
        handle.remove()


CASES: dict[str, tuple[PruneMethod, Places]] = {
    "snapkv": (method("snapkv"), lambda w, K, n: snapkv_places(w, K, n, 4, 3, False, "mean")),
    "snapkv avg max": (
        method("snapkv", pool="avg", pool_size=5, group="max"),
        lambda w, K, n: snapkv_places(w, K, n, 4, 5, True, "max"),
    ),
    "pyramidkv": (method("pyramidkv", beta=3), lambda w, K, n: snapkv_places(w, K, n, 4, 3, False, "mean")),
    "h2o": (method("h2o"), lambda w, K, n: h2o_places(w, K, n, n // 2, False, "mean")),
    "h2o normalised": (
        method("h2o", normalise=True, num_recent=0, group="max"),
        lambda w, K, n: h2o_places(w, K, n, 0, True, "max"),
    ),
    "tova": (method("tova"), tova_places),
    "streaming": (method("streaming_postfill"), lambda w, K, n: streaming_places(len(w[0]), K, n, 4)),
}


def oracle_logits(
    model: Any, ids: list[int], sizes: list[int], places: Places, num_apart: int = 0
) -> tuple[Tensor, list[list[set[int]]]]:
    """Logits [step, vocabulary] of the forced answer, and the kept places [layer][KV head] of what was pruned."""
    K, T = model.config.num_key_value_heads, len(ids)
    group, pruned, window = model.config.num_attention_heads // K, T - num_apart, in_window(model)
    _, weights = slow_forward(model, ids[:pruned], window)
    kept = [
        [set(range(pruned - size, pruned))] * K if slides(model, layer) else places(weights[layer], K, size)
        for layer, size in enumerate(sizes)
    ]

    def sees(layer: int, head: int, row: int, key: int) -> bool:
        inside = window(layer, head, row, key)
        return inside and (row < pruned or key >= pruned or key in kept[layer][head // group])

    logits, _ = slow_forward(model, [*ids, *ANSWER[:-1]], sees)
    return logits[T - 1 :], kept


@pytest.mark.parametrize(
    ("case", "family"), some(list(CASES), ["llama", "llama-mha", "llama-mqa", "qwen2", "gemma2"], each=2)
)
def test_equals_loops(family: str, case: str) -> None:
    """GQA groups of 2, 1 and 4, biases, softcaps and sliding layers: the same sets, the same logits."""
    chosen, places = CASES[case]
    model, ids = tiny_model(family, **({} if family == "gemma2" else SMALL)), random_ids(30, 3).tolist()
    (found,), logits = run(engine(model), chosen, [ids])
    expected, kept = oracle_logits(model, ids, found.kept, places)
    assert (logits[:, 0] - expected).abs().max() < 1e-9
    assert found.kept == [len(layer[0]) for layer in kept]
    assert min(found.kept) < len(ids)


@pytest.mark.parametrize("case", ["snapkv", "h2o", "tova", "pyramidkv"])
def test_question_agnostic_equals_loops(case: str) -> None:
    """Only what stands before the question is pruned; the question is read over the rest, and counts."""
    chosen, places = CASES[case]
    apart = METHODS.get(chosen.name)(
        type(chosen.knobs)(**{**vars(chosen.knobs), "question_agnostic": True}),
    )
    assert isinstance(apart, PruneMethod)
    model, ids = tiny_model("llama", **SMALL), random_ids(32, 4).tolist()
    (found,), logits = run(engine(model), apart, [ids], num_question=5)
    expected, _ = oracle_logits(model, ids, [size - 5 for size in found.kept], places, num_apart=5)
    assert (logits[:, 0] - expected).abs().max() < 1e-9
    assert sum(found.kept) <= BUDGET * 3


def test_sets_equal_loops_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """H2O's sums don't depend on how many rows are held at once."""
    model, ids = tiny_model("llama-mqa", **SMALL), random_ids(30, 3).tolist()
    _, whole = run(engine(model), method("h2o"), [ids])
    monkeypatch.setattr(causal, "_CPU_BLOCK_ELEMENTS", 4 * 30 * 7)
    _, blocks = run(engine(model), method("h2o"), [ids])
    assert (whole - blocks).abs().max() < 1e-12


def test_compact_positions_equal_loops() -> None:
    """StreamingLLM's own positions: sinks stand right in front of the recent tokens."""
    model, ids = exact_model("llama", **SMALL), random_ids(30, 5).tolist()
    chosen = method("streaming_postfill", positions="compact")
    _, logits = run(engine(model), chosen, [ids])
    kept = streaming_places(30, 1, BUDGET, 4)[0]

    def sees(layer: int, head: int, row: int, key: int) -> bool:
        return row < 30 or key >= 30 or key in kept

    def shift(layer: int, head: int, row: int, key: int) -> int:
        return 30 - BUDGET if row >= 30 and key < 4 else 0

    expected, _ = slow_forward(model, [*ids, *ANSWER[:-1]], sees, shift)
    assert (logits[:, 0] - expected[29:]).abs().max() < 1e-9
    _, absolute = run(engine(model), method("streaming_postfill"), [ids])
    assert (absolute[1:] - logits[1:]).abs().max() > 1e-4


# --- exact, batched, without traces --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "agnostic"),
    pairs(NAMES, ["llama", "gemma3", "mistral-sliding", "phi3", "llama-dynamic", "phi3-longrope"], [False, True]),
)
def test_with_room_for_the_prompt_it_is_the_stock_model(name: str, family: str, agnostic: bool) -> None:
    model = tiny_model(family)
    lm, prompts = engine(model, 100), [random_ids(n, n).tolist() for n in (75, 40, 68)]
    with wide_softmax():
        expected = stock_answers_without_text(lm, prompts)
        found, _ = run_free(lm, method(name, question_agnostic=agnostic), prompts, 100)
    assert found == expected


def stock_answers_without_text(lm: RetroLM, prompts: list[list[int]]) -> list[list[int]]:
    lm.tokenizer = type("Mute", (), {"decode": lambda self, tokens, **_: ""})()
    return [list(a.token_ids) for a in stock_answers(lm, prompts, max_new_tokens=6, do_sample=False)]


def run_free(
    lm: RetroLM, chosen: PruneMethod, prompts: list[list[int]], budget: int = BUDGET
) -> tuple[list[list[int]], list[Pruned]]:
    rows = [PrunePrompt(ids, 6) for ids in prompts]
    found = generate_pruned(lm, chosen, rows, kv_budget=budget, max_new_tokens=6, do_sample=False)
    return [pruned.token_ids for pruned in found], found


@pytest.mark.parametrize(
    ("name", "family", "agnostic"), pairs(NAMES, ["qwen2", "gemma3", "mistral-sliding", "phi3"], [False, True])
)
def test_a_ragged_batch_equals_one_at_a_time(name: str, family: str, agnostic: bool) -> None:
    lm, prompts = engine(tiny_model(family)), [random_ids(n, n).tolist() for n in (70, 12, 33, 62)]
    chosen = method(name, question_agnostic=agnostic)
    together, batch = run(lm, chosen, prompts)
    for sample, ids in enumerate(prompts):
        (apart,), logits = run(lm, chosen, [ids])
        assert together[sample].kept == apart.kept and together[sample].attended == apart.attended
        assert (batch[:, sample] - logits[:, 0]).abs().max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind(name: str) -> None:
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lm, one, other = engine(model), random_ids(50, 1).tolist(), random_ids(44, 2).tolist()
    chosen = method(name)
    first = run(lm, chosen, [one])[1]
    run(lm, chosen, [other])
    assert torch.equal(run(lm, chosen, [one])[1], first)
    lm.detach()
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_threads_do_not_meet() -> None:
    """Engines of different methods on one model, used at the same time, answer as they do alone."""
    model = tiny_model("qwen2")
    jobs = [(name, random_ids(60 + seed, seed).tolist()) for seed in range(2) for name in NAMES]
    alone = [run_free(engine(model), method(name), [ids])[0] for name, ids in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: run_free(engine(model), method(job[0]), [job[1]])[0], jobs))
    assert together == alone


# --- budget and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_holds_at_every_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, chosen = engine(tiny_model("qwen2")), method(name)
    handed: list[tuple[int, int]] = []
    decode = PrunePass._decode

    def counted(self: PrunePass, layer: int, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        handed.append((layer, k.shape[2]))
        return decode(self, layer, q, k, *rest)

    monkeypatch.setattr(PrunePass, "_decode", counted)
    (found,), _ = run(lm, chosen, [random_ids(90).tolist()], new=8)
    steps = [[keys for layer, keys in handed if layer == i] for i in range(4)]
    assert [list(row) for row in zip(*steps, strict=True)] == found.attended and len(found.attended) == 7
    for step, row in enumerate(found.attended, start=1):
        assert sum(row) <= 4 * (BUDGET + step) and sum(row) == sum(found.kept) + 4 * step


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_freed_layer_by_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer holds is of the kept size, in storage of its own, before the next layer begins."""
    lm, held = engine(tiny_model("llama")), []
    prefill = PrunePass._prefill

    def watched(self: PrunePass, layer: int, *rest: Any) -> Tensor:
        held.append(
            [
                x.untyped_storage().nbytes()
                for done in self._cache.layers
                for x in (done.keys, done.values)
                if x is not None
            ]
        )
        return prefill(self, layer, *rest)

    monkeypatch.setattr(PrunePass, "_prefill", watched)
    (found,), _ = run(lm, method(name), [random_ids(90).tolist()], new=1)
    row_bytes = 2 * 12 * 8
    for layer, sizes in enumerate(held):
        assert sizes == [size * row_bytes for size in found.kept[:layer] for _ in range(2)]
    assert found.kv_bytes == 2 * row_bytes * sum(found.kept)


def test_a_cache_that_was_not_pruned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = engine(tiny_model("llama"))
    monkeypatch.setattr(PrunePass, "_decode_bias", lambda *_: None)
    keep = PrunePass._hold

    def forgotten(self: PrunePass, layer: int, *rest: Any) -> None:
        keep(self, layer, *rest)
        self._cache.keep(layer, *(torch.zeros(1, 2, 90, 12, dtype=torch.float64) for _ in range(2)))

    monkeypatch.setattr(PrunePass, "_hold", forgotten)
    with pytest.raises(BudgetError, match="not those that snapkv kept"):
        run(lm, method("snapkv"), [random_ids(90).tolist()])


@pytest.mark.parametrize(
    ("tokens", "layers", "budget", "expected"),
    [
        (5000, 32, 2048, (3985, 3860, 3735, 361, 236, 111)),
        (3000, 32, 2048, (2048, 2048, 2048, 2048, 2048, 2048)),
        (4080, 32, 2048, (3985, 3860, 3735, 361, 236, 111)),
        (1000, 4, 2048, (1000, 1000, 1000, 1000, 1000, 1000)),
    ],
)
def test_pyramid_of_the_authors(tokens: int, layers: int, budget: int, expected: tuple[int, ...]) -> None:
    """3986 … 111 in their code, which keeps 16 tokens too many in all: the first 16 layers give back one each."""
    found = METHODS.get("pyramidkv").with_options({}).layer_budgets(tokens, layers, budget)  # type: ignore[attr-defined]
    assert tuple((found * 2)[:3] + found[-3:])[:6] == expected if layers > 5 else set(found) == set(expected)
    assert sum(found) <= layers * budget and len(found) == layers


@pytest.mark.parametrize("budget", [16, 40, 100, 333])
@pytest.mark.parametrize("layers", [1, 2, 3, 7, 24])
@pytest.mark.parametrize("tokens", [17, 60, 200, 5000])
def test_a_pyramid_spends_its_mean_and_falls(tokens: int, layers: int, budget: int) -> None:
    found = METHODS.get("pyramidkv").with_options({}).layer_budgets(tokens, layers, budget)  # type: ignore[attr-defined]
    assert sum(found) == layers * min(tokens, budget)
    assert found == sorted(found, reverse=True) and found[-1] >= min(8, tokens) and found[0] <= tokens


def test_equal_scores_keep_the_later_token() -> None:
    states = PromptStates(0, *(torch.zeros(1, heads, 20, 4) for heads in (4, 2, 2)), scale=1.0)
    flat = method("snapkv").compress(states, 10)
    assert flat.tolist() == [[list(range(10, 20))] * 2]


# --- errors --------------------------------------------------------------------------------------------------------


def test_budgets_that_leave_nothing() -> None:
    lm = engine(tiny_model("llama"))
    with pytest.raises(UserError, match="kv_budget=16 leaves snapkv nothing to choose: 16 tokens always stay"):
        run(lm, method("snapkv", observation_window=16), [random_ids(40).tolist()])
    with pytest.raises(UserError, match="question has 16 tokens, which leaves nothing"):
        run(lm, method("tova", question_agnostic=True), [random_ids(40).tolist()], num_question=16)


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("snapkv", {"pool_size": 4}, "pool_size must be odd"),
        ("snapkv", {"pool": "median"}, "pool='median' is not a choice"),
        ("snapkv", {"observation_window": 0}, "observation_window must be at least 1"),
        ("pyramidkv", {"beta": 0}, "beta must be at least 1"),
        ("h2o", {"num_recent": -1}, "num_recent must be at least 0"),
        ("streaming_postfill", {"num_sinks": -1}, "num_sinks must be at least 0"),
        ("tova", {"recent": 3}, "tova"),
    ],
)
def test_knobs_are_checked(name: str, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        METHODS.get(name).with_options(knobs)


def test_answers_across_a_rope_switch_are_refused() -> None:
    lm = engine(tiny_model("phi3-longrope"))
    with pytest.raises(UserError, match="RoPE switches"):
        run(lm, method("tova"), [random_ids(62).tolist()])
    with pytest.raises(UserError, match="positions=absolute"):
        run(lm, method("streaming_postfill", positions="compact"), [random_ids(40).tolist()])


# --- through the engine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_answers_and_accounts(name: str) -> None:
    options = {"observation_window": 4} if name in ("snapkv", "pyramidkv") else {}
    config = RetroConfig(kv_budget=BUDGET, page_size=4)
    lm = RetroLM(tiny_model("llama"), config=config, method=name, method_options=options)
    ids = random_ids(60).tolist()
    prompts = [Prompt((ids[0],), tuple(ids[1:50]), tuple(ids[50:])), Prompt((ids[0],), tuple(ids[1:20]), (5, 6))]
    answers = lm.answer(prompts, max_new_tokens=5, do_sample=False)
    assert [a.attended_by_layer["prefill"] for a in answers] == [(60,) * 4, (22,) * 4]
    for answer in answers:
        assert sum(answer.attended_by_layer["decode"]) == 4 * (BUDGET + len(answer.token_ids) - 1)
        assert answer.kv_bytes["device"] > 0 and answer.timings.ttft_s > 0
    assert answers[0].max_position == 60 + len(answers[0].token_ids) - 2
    with torch.no_grad():
        expected = lm.model(torch.tensor([ids[:BUDGET]])).logits[0]
    assert torch.equal(lm.logits(torch.tensor(ids[:BUDGET])), expected)
    with pytest.raises(UserError, match="would be the stock model's"):
        lm.logits(torch.tensor(ids))


def test_the_evaluation_runs_them_and_stops_those_that_did_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [Variant(name, 64) for name in ("snapkv", "pyramidkv")]
    rows = run_stories(tmp_path / "rows", 3, variants, batch_size=2)
    assert [row["num_failed"] for row in rows] == [0, 0]
    assert all(row["attended_tokens"]["prefill"] > 100 for row in rows)
    monkeypatch.setattr(PruneMethod, "layer_budgets", lambda self, tokens, layers, budget: [tokens] * layers)
    with pytest.raises(BudgetError, match="Method 'snapkv' attended"):
        run_stories(tmp_path / "nothing", 1, variants[:1])


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_beams_of_a_ragged_batch_follow_their_caches(family: str) -> None:
    """Each beam stays with its prompt; with room for everything they are the stock model's beams."""
    model, prompts = tiny_model(family), [random_ids(n, n).tolist() for n in (60, 41)]
    lm, options = engine(model), {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    rows = [PrunePrompt(ids, 0) for ids in prompts]
    for budget in (BUDGET, 100):
        found = generate_pruned(lm, method("snapkv"), rows, kv_budget=budget, **options)
        apart = [generate_pruned(lm, method("snapkv"), [row], kv_budget=budget, **options)[0] for row in rows]
        assert [one.token_ids for one in found] == [one.token_ids for one in apart]
    with wide_softmax():
        out = [model.generate(torch.tensor([ids]), pad_token_id=1, **options)[0, len(ids) :] for ids in prompts]
    assert [one.token_ids for one in found] == [row.tolist() for row in out]
