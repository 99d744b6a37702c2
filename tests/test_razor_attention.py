"""RazorAttention's own parts: the compensation token, which heads retrieve, and what is counted and freed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import naive_tokens as naive
from retrolm.config import RetroConfig
from retrolm.engine import answer_tokens
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.part_attention import key_set
from retrolm.engine.repeat_reading import repeat_marks, repeat_scores, repeated_ids
from retrolm.engine.results import Answer
from retrolm.errors import UserError
from retrolm.methods import METHODS
from retrolm.methods.razor_attention import RazorAttention
from retrolm.methods.token_base import ChunkView, NewTokens, RepeatScores, RepeatText, TokenCache
from retrolm.ops.causal import mass_on
from retrolm.ops.joint_attention import KeySet, attend_sets, attend_sets_lse, attend_sets_reference
from retrolm.ops.rotary import rotate
from tiny_models import ExactRotary, exact_model, random_ids, tiny_model

BUDGET, NEW = 40, 6
NO_HEADS = {"induction_share": 0.0, "echo_share": 0.0}


def engine(model: Any, method: str = "razor_attention", **knobs: Any) -> RetroLM:
    config = RetroConfig(kv_budget=BUDGET, page_size=8)
    return RetroLM(model, config=config, method=method, method_options=knobs)


def ask(model: Any, rows: list[Tensor], method: str = "razor_attention", **knobs: Any) -> tuple[list[Answer], Tensor]:
    """Answers of one engine, and their logits [steps, B, vocabulary]."""
    seen: list[Tensor] = []

    def note(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    lm = engine(model, method, **knobs)
    prompts = [Prompt((), tuple(ids[:-4].tolist()), tuple(ids[-4:].tolist())) for ids in rows]
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "logits_processor": [note]}
    answers = lm.answer(prompts, max_new_tokens=NEW, **options)
    lm.detach()
    return answers, torch.stack(seen)


# --- the compensation token ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_log_count_is_as_many_copies(group: int, softcap: float | None) -> None:
    """In the written-out attention, the fast path and the one that gives the log-sum-exp."""
    make = torch.Generator().manual_seed(group)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    q, k, v, one_k, one_v = noise(2, 2 * group, 3, 4), *(noise(2, 2, S, 4) for S in (5, 5, 1, 1))
    near = KeySet(q, k, v, torch.ones(2, 2, 3, 5, dtype=torch.bool))
    yes = torch.ones(2, 2, 3, 1, dtype=torch.bool)
    made_up = KeySet(q, one_k, one_v, yes, torch.full((2, 1, 1), math.log(7.0), dtype=torch.float64))
    copies = KeySet(q, one_k.expand(-1, -1, 7, -1), one_v.expand(-1, -1, 7, -1), yes.expand(-1, -1, -1, 7))
    expected = attend_sets_reference([near, copies], 0.5, softcap)[0]
    for attend in (attend_sets, lambda *args: attend_sets_reference(*args)[0], lambda *args: attend_sets_lse(*args)[0]):
        assert (attend([near, made_up], 0.5, softcap) - expected).abs().max() < 1e-12
    half = [KeySet(*(x.half() for x in (s.q_BHQD, s.k_BKSD, s.v_BKSD)), s.allowed_BJQS, s.bias_BJS)
            for s in (near, made_up)]  # fmt: skip
    assert (attend_sets(half, 0.5, softcap).double() - expected).abs().max() < 5e-3


def view_of(k: Tensor, v: Tensor, q: Tensor, budget: int, rope: Any) -> ChunkView:
    """The first generated token's view of a cache [B, K, T, D] whose last place is its own."""
    B, T = len(k), k.shape[2]
    true = torch.arange(T).expand(B, 1, T)
    starts = torch.full((B,), T - 1)
    new = NewTokens(true[:, 0, -1:], [T - 1] * B, [1] * B, starts, torch.ones(B, dtype=torch.int64), False)
    return ChunkView(0, budget, TokenCache(k, v, true), q, new, rope)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_identical_keys_that_are_given_up_leave_attention_as_it_was(group: int) -> None:
    """Keys that are the same after RoPE: one compensation token with the log of their number is exact."""
    make, T, budget = torch.Generator().manual_seed(0), 50, 20
    k, v = (torch.randn(2, 2, T, 8, generator=make, dtype=torch.float64) for _ in range(2))
    q = torch.randn(2, 2 * group, 1, 8, generator=make, dtype=torch.float64)

    def rope(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].double() * torch.tensor([1.0, 0.1, 0.01, 0.001])
        return torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    given_up = torch.arange(4, T - budget + 5)  # behind 4 first tokens, before 15 recent ones
    cos, sin = rope(given_up)
    k[:, :, given_up], v[:, :, given_up] = rotate(k[:, :, :1].expand(-1, -1, len(given_up), -1), cos, -sin), v[:, :, :1]
    cos, sin = rope(torch.arange(T))
    placed, query = rotate(k, cos, sin), rotate(q, cos[-1], sin[-1])
    full = KeySet(query, placed, v, torch.ones(2, 1, 1, T, dtype=torch.bool))
    expected = attend_sets_reference([full], 0.3)[0]
    for compensation, is_exact in (("weighted", True), ("plain", False), ("none", False)):
        method = METHODS.get("razor_attention").with_options({"compensation": compensation})
        view = view_of(k, v, q, budget, rope)
        parts = method.select(view)  # type: ignore[attr-defined]
        sets = [key_set(view, part) for part in parts]
        assert sum(int(one.allowed_BJQS.sum()) for one in sets) == 2 * budget
        assert ((attend_sets(sets, 0.3) - expected).abs().max() < 1e-12) == is_exact


class NoAngles(ExactRotary):
    """Keys that don't depend on their place."""

    def frequencies(self, layer_type: str | None = None) -> tuple[Tensor, float]:
        found, scaling = super().frequencies(layer_type)
        return found * 0, scaling


@pytest.mark.parametrize("family", ["llama", "llama-mha", "llama-mqa", "qwen2"])
def test_a_text_of_one_token_loses_nothing(family: str) -> None:
    """One layer without angles and a text that repeats one token: giving up its middle changes no answer."""
    model = tiny_model(family, num_hidden_layers=1)
    model.model.rotary_emb = NoAngles(model.model.rotary_emb)
    rows = [torch.cat([random_ids(4), torch.full((length,), 77)]) for length in (90, 60)]
    _, expected = ask(model, rows, "full")
    answers, found = ask(model, rows, **NO_HEADS)
    assert (found - expected).abs().max() < 2e-6
    assert [answer.attended_tokens["decode"] for answer in answers] == [BUDGET, BUDGET]
    for compensation in ("plain", "none"):
        assert (ask(model, rows, compensation=compensation, **NO_HEADS)[1] - expected).abs().max() > 1e-3


# --- which heads retrieve ------------------------------------------------------------------------------------------


def test_planted_echo_and_induction_heads_are_found() -> None:
    """Query head 0 looks for its own token, head 3 for what followed it: echo and induction in full."""
    once = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    ids, eye = once.repeat(4), torch.eye(40, dtype=torch.float64)
    q, k = torch.zeros(1, 4, 160, 40, dtype=torch.float64), torch.zeros(1, 2, 160, 40, dtype=torch.float64)
    q[0, 0] = q[0, 3] = 100 * eye[ids]
    k[0, 0], k[0, 1, 1:] = eye[ids], eye[ids[:-1]]
    echo, induction = mass_on(q, k, repeat_marks(ids), 1.0, first_row=40)[:, 0].mean(-1).amax(-1)
    # An echo head also attends its own place: 1 of 2, 2 of 3 and 3 of 4 equal keys lie before it.
    assert torch.allclose(echo[0], torch.tensor((1 / 2 + 2 / 3 + 3 / 4) / 3, dtype=torch.float64))
    assert induction[1] > 0.999 and induction[0] < 0.1 and echo[1] < 0.1
    scores = RepeatScores(echo[None], induction[None])
    for knobs, expected in ((("echo_share", "induction_share"), [True, False]),
                            (("induction_share", "echo_share"), [False, True])):  # fmt: skip
        method = METHODS.get("razor_attention").with_options({knobs[0]: 0.5, knobs[1]: 0.0})
        assert method.dense_heads(scores).tolist() == [expected]  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["llama", "llama-mha", "llama-mqa", "qwen3", "gemma2", "gemma3", "phi3-longrope"])
def test_scores_equal_those_of_written_out_matrices(family: str) -> None:
    """With groups of 1, 2 and 4 query heads, softcaps and sliding layers, which have none."""
    model = exact_model(family) if family != "phi3-longrope" else tiny_model(family)
    lm = engine(model, **NO_HEADS)
    found = repeat_scores(lm.backbone, lm.attachment, RepeatText(11, 3))
    induction, echo = naive.repeat_scores(naive.NaiveTokens(model, naive.Rule()), 11, 3)
    assert len(echo) == int(found.echo_LK.isfinite().sum())
    for (layer, head), score in echo.items():
        assert abs(float(found.echo_LK[layer, head]) - score) < 1e-6
        assert abs(float(found.induction_LK[layer, head]) - induction[layer, head]) < 1e-6


def test_shares_are_of_the_heads_that_choose_and_rounded_up() -> None:
    scores = torch.arange(100.0).view(10, 10)
    blind = torch.cat([scores, torch.full((7, 10), -torch.inf)])  # sliding layers
    method = METHODS.get("razor_attention")()
    assert isinstance(method, RazorAttention)
    heads = method.dense_heads(RepeatScores(-blind.abs(), blind))
    assert int(heads.sum()) == 14 + 1 and heads[8, 6:].all() and heads[9].all() and heads[0, 0]
    nothing = METHODS.get("razor_attention").with_options(NO_HEADS)
    assert isinstance(nothing, RazorAttention) and nothing.repeat_text is None


def test_the_default_text_is_the_published_one_or_fills_the_window() -> None:
    lm = engine(tiny_model("llama"), **NO_HEADS)
    ids = repeated_ids(lm.backbone, RepeatText())
    assert len(ids) == 1 + 4 * 127 and ids[0] == 0 and torch.equal(ids[1:128], ids[-127:])
    with pytest.raises(UserError, match="between 2 and 127"):
        engine(tiny_model("llama"), num_random=128).answer([Prompt((), (3, 4), (5,))], max_new_tokens=1)


# --- what is counted and freed -------------------------------------------------------------------------------------


def test_retrieval_heads_are_reported_apart_and_the_model_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[RepeatText] = []

    def counted(backbone: Any, attachment: Any, text: RepeatText) -> RepeatScores:
        readings.append(text)
        return repeat_scores(backbone, attachment, text)

    monkeypatch.setattr(answer_tokens, "repeat_scores", counted)
    lm, ids = engine(tiny_model("llama")), random_ids(90).tolist()
    notes: list[tuple[str, ...]] = []
    for _ in range(2):
        (answer,) = lm.answer([Prompt((), tuple(ids[:-4]), tuple(ids[-4:]))], max_new_tokens=NEW, eos_token_id=None)
        attended = answer.attended_tokens
        notes.append(answer.notes)
        assert attended["decode"] == BUDGET and attended["dense_heads"] == 90 + NEW - 1
        assert (
            max(answer.attended_by_layer["decode"]) == 90 + NEW - 1
            and min(answer.attended_by_layer["decode"]) <= BUDGET
        )
    assert readings == [RepeatText(None, 4)]
    assert "looked for its heads first" in notes[0][0] and notes[1] == ()


def test_with_only_retrieval_heads_it_is_full_attention() -> None:
    model, rows = exact_model("llama"), [random_ids(90), random_ids(50)]
    answers, found = ask(model, rows, induction_share=1.0)
    assert (found - ask(model, rows, "full")[1]).abs().max() < 2e-6
    assert answers[0].attended_tokens["dense_heads"] == 90 + NEW - 1


def test_layers_without_retrieval_heads_free_what_they_give_up() -> None:
    model = tiny_model("llama")
    row_bytes = 2 * 2 * 12 * 8
    free, _ = ask(model, [random_ids(200)], **NO_HEADS)
    assert free[0].kv_bytes["device"] <= 4 * BUDGET * row_bytes
    some, _ = ask(model, [random_ids(200)], induction_share=0.25, echo_share=0.0, num_random=9)
    whole = sum(layer > BUDGET for layer in some[0].attended_by_layer["decode"])
    assert 0 < whole < 4
    most = whole * (200 + NEW - 1) + (4 - whole) * BUDGET
    assert whole * 200 * row_bytes < some[0].kv_bytes["device"] <= most * row_bytes


def test_fewer_recent_tokens_can_be_kept() -> None:
    answers, _ = ask(tiny_model("llama"), [random_ids(90)], num_recent=10, num_sink=2, **NO_HEADS)
    assert answers[0].attended_tokens["decode"] == 2 + 10 + 1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"echo_share": 1.5}, "from 0 to 1"),
        ({"repeats": 1}, "repeats must be at least 2"),
        ({"num_random": 1}, "num_random must be at least 2"),
        ({"num_recent": 40}, "too small for razor_attention"),
        ({"compensation": "some"}, "weighted"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine(tiny_model("llama"), **knobs)
