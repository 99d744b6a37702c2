"""RetroAttention against its naive self, and at its limits: the base method, full attention, the union of pages."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import naive_tokens as naive
from grids import some
from naive_retro import NaiveRetro
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.methods.quest_tokens import Quest
from retrolm.methods.retro_attention import QuestRetro
from retrolm.ops.merge_attention import merge_attention
from tiny_models import exact_model, random_ids, tiny_model

BUDGET, NEW = 24, 9
SMALL = {"page": 4, "num_dense_layers": 1}


def ask(model: Any, rows: list[Tensor], method: str = "quest_retro", kv_budget: int = BUDGET, **knobs: Any) -> Any:
    """Answers, and their logits [steps, B, vocabulary]."""
    seen: list[Tensor] = []

    def keep(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    options = {} if method == "full" else {"method_options": {**SMALL, **knobs}}
    lm = RetroLM(model, config=RetroConfig(kv_budget=kv_budget, page_size=8), method=method, **options)
    prompts = [Prompt((), tuple(ids[:-4].tolist()), tuple(ids[-4:].tolist())) for ids in rows]
    answers = lm.answer(prompts, max_new_tokens=NEW, do_sample=False, logits_processor=[keep], eos_token_id=None)
    lm.detach()
    return answers, torch.stack(seen)


@pytest.mark.parametrize(
    ("family", "revising"),
    some(
        ["llama", "llama-mqa", "qwen2", "gemma2", "gemma3", "mistral-sliding"],
        [(2, "kept"), (4, "kept"), (3, "recomputed")],
        each=2,
    ),
)
def test_it_equals_its_naive_self(family: str, revising: tuple[int, str]) -> None:
    window, partials = revising
    model, ids = exact_model(family, seed=3), random_ids(50, seed=5)
    (answer,), logits = ask(model, [ids], window=window, partials=partials)
    reader = NaiveRetro(model, naive.Quest(BUDGET, 4, 1), window, partials == "kept")
    reader.chunk(ids[:-1].tolist())
    for token in [int(ids[-1]), *answer.token_ids[:-1]]:
        reader.step(token)
    assert np.abs(logits[:, 0].numpy() - np.stack(reader.logits[len(ids) - 1 :])).max() < 2e-6


@pytest.mark.parametrize("base", ["quest", "arkvale"])
def test_a_window_of_one_is_the_base_method(base: str) -> None:
    model, ids = exact_model("llama"), random_ids(50)
    retro, plain = (
        ask(model, [ids], name, **knobs)[1] for name, knobs in ((f"{base}_retro", {"window": 1}), (base, {}))
    )
    assert torch.equal(retro, plain)
    assert not torch.equal(ask(model, [ids], f"{base}_retro", window=2)[1], plain)


@pytest.mark.parametrize("partials", ["kept", "recomputed"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
def test_with_room_for_everything_it_is_full_attention(family: str, partials: str) -> None:
    model, ids = exact_model(family), random_ids(50)
    _, expected = ask(model, [ids], "full")
    _, found = ask(model, [ids], kv_budget=128, window=4, partials=partials)
    assert (found - expected).abs().max() < 1e-5  # generate's scores are float32


def test_with_one_sparse_layer_kept_outputs_are_attention_over_the_union() -> None:
    """Queries of the only sparse layer never change, so that old partial outputs are those recomputed."""
    model, ids = exact_model("llama"), random_ids(50)
    knobs = {"window": 5, "num_dense_layers": 3}  # of four layers
    kept, again = (ask(model, [ids], **knobs, partials=name)[1] for name in ("kept", "recomputed"))
    assert (kept - again).abs().max() < 1e-5
    three, other = (ask(model, [ids], window=5, partials=name)[1] for name in ("kept", "recomputed"))
    assert (three - other).abs().max() > 1e-4


def test_pages_that_are_all_loaded_next_give_past_tokens_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two steps, the second loads everything: both outputs of the sparse layer are then dense attention's."""
    model, ids = exact_model("llama"), random_ids(50)
    outputs: list[Tensor] = []
    choose, merge = Quest.choose, QuestRetro.merge

    def all_but_first(self: Any, view: Any) -> Any:
        chosen = choose(self, view)
        return chosen if chosen is None or not outputs else torch.ones_like(chosen)

    def spy(self: Any, view: Any, out: Tensor, lse: Tensor) -> Tensor:
        outputs.append(merge(self, view, out, lse))
        return outputs[-1]

    monkeypatch.setattr(QuestRetro, "choose", all_but_first)
    monkeypatch.setattr(QuestRetro, "merge", spy)
    monkeypatch.setattr(QuestRetro, "check_attended", lambda *_: None)
    monkeypatch.setattr(QuestRetro, "part_of", _unlimited(QuestRetro.part_of))
    ask(model, [ids], window=3, num_dense_layers=3)
    sparse = outputs.copy()
    outputs.clear()
    outputs.append(torch.zeros(0))  # from the first step on, everything
    ask(model, [ids], window=3, num_dense_layers=3)
    dense = outputs[1:]
    assert (sparse[0] - dense[0]).abs().max() > 1e-3
    assert torch.allclose(sparse[1][:, :, 0], dense[1][:, :, 0], atol=1e-12)  # the second token may be another one


def _unlimited(part_of: Any) -> Any:
    """`part_of` with room for more places than the budget."""
    return lambda self, view, chosen: part_of(self, dataclasses.replace(view, kv_budget=1000), chosen)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("partials", ["kept", "recomputed"])
def test_a_batch_gives_what_its_prompts_give_alone(family: str, partials: str) -> None:
    model, rows = exact_model(family), [random_ids(length, seed=length) for length in (50, 9, 1 + BUDGET, 41)]
    together, logits = ask(model, rows, window=4, partials=partials)
    for number, ids in enumerate(rows):
        (alone,), own = ask(model, [ids], window=4, partials=partials)
        assert together[number].token_ids == alone.token_ids
        assert together[number].attended_tokens == alone.attended_tokens
        assert (logits[:, number] - own[:, 0]).abs().max() < 1e-6


def test_kept_outputs_stay_within_the_budget_and_recomputed_ones_say_what_they_read() -> None:
    model, ids = tiny_model("llama"), random_ids(90)
    (kept,), _ = ask(model, [ids], window=4)
    (again,), _ = ask(model, [ids], window=4, partials="recomputed")
    assert kept.attended_tokens["decode"] <= BUDGET < again.attended_tokens["decode"] <= 4 * BUDGET


def test_merging_equals_one_softmax() -> None:
    make = torch.Generator().manual_seed(0)
    logits, values = (torch.randn(*shape, generator=make, dtype=torch.float64) for shape in ((7,), (7, 3)))
    parts = [(logits[a:b].softmax(0) @ values[a:b], logits[a:b].logsumexp(0)) for a, b in ((0, 4), (4, 7))]
    out, lse = merge_attention(*parts[0], *parts[1])
    assert torch.allclose(out, logits.softmax(0) @ values) and torch.allclose(lse, logits.logsumexp(0))
    nothing = torch.zeros(3, dtype=torch.float64), torch.tensor(-torch.inf, dtype=torch.float64)
    assert torch.equal(merge_attention(*parts[0], *nothing)[0], parts[0][0])
    assert not merge_attention(*nothing, *nothing)[0].any()


@pytest.mark.parametrize(("knobs", "message"), [({"window": 0}, "at least 1"), ({"partials": "old"}, "kept")])
def test_knobs_that_make_no_sense_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(tiny_model("llama"), [random_ids(20)], **knobs)
