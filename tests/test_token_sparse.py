"""Token Sparse Attention against its naive self, and at its limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from naive_token_sparse import NaiveTokenSparse, TokenSparse
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from tiny_models import exact_model, random_ids, stock_logits, tiny_model, wide_softmax

NEW = 5
SMALL = {"window": 6, "tau": 0.3, "min_tokens": 8, "pool_size": 3, "first_layer": 1, "last_layer": 2}


def ask(model: Any, rows: list[Tensor], **knobs: Any) -> tuple[list[Any], Tensor]:
    """Answers, and their logits [steps, B, vocabulary]."""
    seen: list[Tensor] = []

    def keep(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    lm = RetroLM(model, method="token_sparse", method_options={**SMALL, **knobs}, config=RetroConfig())
    prompts = [Prompt((), tuple(ids[:-4].tolist()), tuple(ids[-4:].tolist())) for ids in rows]
    with wide_softmax():
        answers = lm.answer(prompts, max_new_tokens=NEW, do_sample=False, logits_processor=[keep], eos_token_id=None)
    lm.detach()
    return answers, torch.stack(seen)


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "qwen2", "gemma2", "gemma3", "mistral-sliding"])
def test_it_equals_its_naive_self(family: str) -> None:
    model, ids = exact_model(family, seed=3), random_ids(50, seed=5)
    (answer,), logits = ask(model, [ids])
    rule = TokenSparse(6, 0.3, 8, 3, range(1, 3))
    reader = NaiveTokenSparse(model, rule)
    reader.chunk(ids[:-1].tolist())
    for token in [int(ids[-1]), *answer.token_ids[:-1]]:
        reader.chunk([token], answering=True)
    assert any(len(kept) < 49 for kept in rule.kept.values())
    assert np.abs(logits[:, 0].numpy() - np.stack(reader.logits[len(ids) - 1 :])).max() < 2e-6
    sparse = [layer for layer in (1, 2) if not reader._keeps_window(layer)]
    assert [answer.attended_by_layer["prefill"][i] for i in sparse] == [max(reader.counts[i][:49]) for i in sparse]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("knobs", [{"min_tokens": 44}, {"window": 50}, {"first_layer": 9, "last_layer": 12}])
def test_with_nothing_to_drop_it_is_full_attention(family: str, knobs: dict[str, int]) -> None:
    model, ids = exact_model(family), random_ids(50)
    (answer,), logits = ask(model, [ids], **knobs)
    expected = stock_logits(model, torch.cat([ids, torch.tensor(answer.token_ids)]))[len(ids) - 1 : -1]
    assert (logits[:, 0] - expected).abs().max() < 1e-5
    (_, other) = ask(model, [ids])
    assert (other[:, 0] - expected).abs().max() > 1e-3


def test_a_share_of_nothing_drops_one_token() -> None:
    model, ids = exact_model("llama"), random_ids(50)
    (answer,), _ = ask(model, [ids], tau=0.0, min_tokens=0)
    assert answer.attended_by_layer["prefill"] == (49, 48, 48, 49)
    assert answer.attended_tokens["decode"] == 50 + NEW - 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_batch_gives_what_its_prompts_give_alone(family: str) -> None:
    model, rows = exact_model(family), [random_ids(length, seed=length) for length in (50, 9, 31)]
    together, logits = ask(model, rows)
    for number, ids in enumerate(rows):
        (alone,), own = ask(model, [ids])
        assert together[number].attended_by_layer == alone.attended_by_layer
        assert (logits[:, number] - own[:, 0]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"window": 0}, "window"), ({"pool_size": 4}, "odd"), ({"tau": 1.0}, "tau"), ({"min_tokens": -1}, "min_tokens")],
)
def test_knobs_that_make_no_sense_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(tiny_model("llama"), [random_ids(20)], **knobs)
