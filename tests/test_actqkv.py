"""ActQKV's own parts: the probe query, the question's share in it, how many blocks a layer takes, and its limits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.question_reading import read_questions
from retrolm.errors import UserError
from retrolm.methods import METHODS, actqkv
from retrolm.methods.actqkv import ActQKV, normal_entropy, weighted_query
from retrolm.methods.infllm import BlockSplit
from retrolm.methods.token_base import ChunkView
from tiny_models import exact_model, random_ids, tiny_model

BUDGET, NEW = 60, 8
SPLIT = {"num_init": 3, "window": 12, "block": 4, "top_k": 8, "unit": 5, "repr_top_k": 2}
QUICK = {"history": 4, "warm_up": 4, "min_blocks": 2}


def ask(model: Any, rows: list[Tensor], method: str = "actqkv", **knobs: Any) -> Tensor:
    """Logits of the answers' steps, [steps, B, vocabulary]."""
    seen: list[Tensor] = []

    def note(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    config = RetroConfig(kv_budget=BUDGET, page_size=8)
    lm = RetroLM(model, config=config, method=method, method_options={**SPLIT, **knobs})
    prompts = [Prompt((), tuple(ids[:-4].tolist()), tuple(ids[-4:].tolist())) for ids in rows]
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "logits_processor": [note]}
    lm.answer(prompts, max_new_tokens=NEW, **options)
    lm.detach()
    return torch.stack(seen)


# --- the query -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_the_probe_is_a_mean_by_activation_bias(seed: int, sizes: list[int]) -> None:
    """Against loops over all tokens so far, whatever the sizes of the units; samples side by side don't meet."""
    make, state = np.random.default_rng(seed), dict[str, Tensor]()
    so_far: list[list[np.ndarray]] = [[], []]
    for size in sizes:
        units = [make.normal(size=(num, 2, 3)) + 5 for num in (size, 2)]
        queries, real = torch.zeros(2, 2, 6, 3, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.bool)
        for sample, unit in enumerate(units):
            queries[sample, :, : len(unit)], real[sample, : len(unit)] = torch.from_numpy(unit).transpose(0, 1), True
            so_far[sample] += list(unit.reshape(-1, 6))
        queries[~real[:, None].expand(-1, 2, -1)] = 1e6  # padding, whatever it holds
        found = weighted_query(queries, real, state)
        for sample, unit in enumerate(units):
            expected = np.zeros(6)
            if len(unit):
                rows, past = unit.reshape(-1, 6), np.stack(so_far[sample])
                spread = past.var(0) + 0.01 * past.var(0).mean()
                biases = [((row - past.mean(0)) ** 2 / spread).mean() if spread.any() else 0.0 for row in rows]
                weights = np.array(biases) / sum(biases) if sum(biases) else np.full(len(rows), 1 / len(rows))
                expected = weights @ rows
            assert np.abs(found[sample].numpy().ravel() - expected).max() < 1e-9


def test_an_unusual_token_is_what_is_looked_for() -> None:
    queries = torch.randn(1, 2, 30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    queries[:, :, 17] = 100.0
    probe = weighted_query(queries, torch.ones(1, 30, dtype=torch.bool), {})
    assert (probe - 100).abs().max() < 5 and (queries.mean(2) - 100).abs().min() > 90
    alike = weighted_query(queries[:, :, 17:18].expand(-1, -1, 9, -1), torch.ones(1, 9, dtype=torch.bool), {})
    assert torch.allclose(alike, queries[:, :, 17])


def test_with_plain_means_and_products_it_is_infllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ActQKV adds is the weights, the cosine, the question and the cut-off, and nothing else."""
    model, rows = exact_model("llama"), [random_ids(90), random_ids(70)]
    expected = ask(model, rows, "infllm")
    plain: dict[str, Any] = {"relevance": "dot", "question_weight": 0.0}
    assert (ask(model, rows, **plain) - expected).abs().max() > 1e-3

    def mean(queries: Tensor, real: Tensor, state: dict[str, Tensor]) -> Tensor:
        return (queries * real[:, None, :, None]).sum(2) / real.sum(1).clamp(min=1)[:, None, None]

    monkeypatch.setattr(actqkv, "weighted_query", mean)
    assert torch.equal(ask(model, rows, **plain), expected)
    for changed in ({"relevance": "cosine"}, {"question_weight": 1.0}, {**QUICK, "temperature": 1e-6}):
        assert (ask(model, rows, **{**plain, **changed}) - expected).abs().max() > 1e-3


def test_statistics_of_a_unit_differ_from_those_of_the_prompt() -> None:
    model, rows = tiny_model("llama"), [random_ids(90)]
    knobs: dict[str, Any] = {"question_weight": 0.0, "top_k": 2}
    assert (ask(model, rows, **knobs) - ask(model, rows, **knobs, statistics="window")).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
def test_questions_are_read_alone_and_side_by_side(family: str) -> None:
    lm = RetroLM(tiny_model(family), config=RetroConfig(kv_budget=64, page_size=8), method="actqkv")
    questions = [random_ids(length, length).tolist() for length in (600, 7, 0)]
    together = read_questions(lm.backbone, lm.attachment, questions, lm.pad_id)
    assert sorted(together) == [layer for layer in range(4) if lm.backbone.retrieves(layer)]
    for sample, ids in enumerate(questions[:2]):
        for layer, found in read_questions(lm.backbone, lm.attachment, [ids], lm.pad_id).items():
            there = together[layer].there_BQ[sample]
            queries = together[layer].q_BHQD[sample][:, there]
            assert int(there.sum()) == len(ids) and (queries - found.q_BHQD[0]).abs().max() < 1e-9
    assert not any(found.there_BQ[2].any() for found in together.values())
    assert read_questions(lm.backbone, lm.attachment, [[]], lm.pad_id) == {}


def test_the_question_counts_while_reading_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[bool, bool]] = set()
    question = ActQKV._question

    def spy(self: ActQKV, view: ChunkView) -> Tensor | None:
        found = question(self, view)
        seen.add((view.new.is_prefill, found is not None))
        return found

    monkeypatch.setattr(ActQKV, "_question", spy)
    ask(tiny_model("llama"), [random_ids(90)])
    assert seen == {(True, True), (False, False)}


# --- how many blocks -----------------------------------------------------------------------------------------------


def taken_of(monkeypatch: pytest.MonkeyPatch, rows: list[Tensor], **knobs: Any) -> Tensor:
    """Blocks that each layer took in each step of the answer, [steps, layers, B]."""
    taken: list[Tensor] = []
    stock = ActQKV._num_chosen

    def spy(self: ActQKV, view: ChunkView, split: BlockSplit, num_blocks: Tensor) -> Tensor:
        found = stock(self, view, split, num_blocks)
        if not view.new.is_prefill:
            taken.append(found.long())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ActQKV, "_num_chosen", spy)
        ask(exact_model("llama"), rows, **knobs)
    return torch.stack(taken).unflatten(0, (NEW, 4))


def test_without_a_temperature_every_layer_takes_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """The softmax falls on one block, entropies are zero, and no layer has a claim to more."""
    rows = [random_ids(90), random_ids(70)]
    assert set(taken_of(monkeypatch, rows, **QUICK, temperature=1e-9).flatten().tolist()) == {2}
    assert set(taken_of(monkeypatch, rows, **QUICK, temperature=1e9).flatten().tolist()) == {8}
    assert set(taken_of(monkeypatch, rows, **QUICK, temperature=1e9, share=0.5).flatten().tolist()) == {4}


def test_layers_share_a_step_by_their_entropies(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = taken_of(monkeypatch, [random_ids(90), random_ids(70)], **QUICK, temperature=0.03, share=0.5)
    assert int(taken.min()) >= 2 and int(taken.max()) <= 8
    assert (taken.amax(1) > taken.amin(1)).float().mean() > 0.5
    assert ((taken.sum(1) <= 0.5 * 8 * 4) | (taken[:, -1] == 2)).all()  # the least is taken whatever is left


def test_before_the_warm_up_layers_share_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = {**QUICK, "temperature": 0.03, "share": 0.5}
    few = taken_of(monkeypatch, [random_ids(90)], **{**knobs, "warm_up": 1000})
    assert set(few.flatten().tolist()) == {4}
    # 15 units of the prompt choose (from 19 tokens on, in fives), then one per step: the 20th choice is the fifth step.
    late = taken_of(monkeypatch, [random_ids(90)], **{**knobs, "warm_up": 20})[:, :, 0]
    changes = [bool((step != 4).any()) for step in late]
    assert changes[0] is False and changes[-1] is True and changes == sorted(changes)


def test_entropy_runs_from_zero_to_one() -> None:
    there = torch.tensor([[True] * 4, [True, True, False, False], [True] + [False] * 3, [False] * 4])
    logits = torch.tensor([[1.0, 1, 1, 1], [3, 3, 9, 9], [2, 0, 0, 0], [1, 2, 3, 4]], dtype=torch.float64)
    assert torch.allclose(normal_entropy(logits, there), torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert normal_entropy(logits[3:] * 1e6, there[:1]).tolist() == [0.0]
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    found = normal_entropy(weights.log()[None], torch.ones(1, 3, dtype=torch.bool))
    assert torch.allclose(found, -(weights * weights.log()).sum() / np.log(3))


# --- the split -----------------------------------------------------------------------------------------------------


def test_splits_of_2k_and_6k() -> None:
    """First, window, block, chosen blocks, unit; what fills no block yet and the unit count inside the budget, too."""
    method = METHODS.get("actqkv")()
    assert isinstance(method, ActQKV)
    splits = [method._split(budget) for budget in (2048, 6144)]
    assert [dataclasses.astuple(split) for split in splits] == [(64, 512, 32, 37, 256), (192, 1536, 32, 129, 256)]
    assert [method._min_blocks(split) for split in splits] == [26, 90]
    assert method._min_blocks(BlockSplit(64, 512, 32, 46, 256)) == 32


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"share": 0.0}, "above 0 and at most 1"),
        ({"temperature": 0.0}, "above 0, got"),
        ({"question_weight": -1.0}, "at least 0"),
        ({"history": 0}, "at least 1"),
        ({"min_blocks": 9}, "8 blocks of 4 tokens"),
        ({"relevance": "angle"}, "cosine"),
        ({"window": 58}, "too small for actqkv"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(tiny_model("llama"), [random_ids(20)], **knobs)
