"""Questions whose layers agree on pages: the same in batches, tiers and rounds; nothing where all pages fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine.agreement import agreed_scores, agreement
from retrolm.engine.captures import LayerChoice
from retrolm.engine.encoder import Encoder
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from tiny_models import tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

QUESTIONS = ["Who counted the lamps?", "What colour is the grass, and what the sky above it?"]


def make(method: str = "retrolm", agreement_layers: int = 2, **options: Any) -> RetroLM:
    config = RetroConfig(**{"kv_budget": 192, "page_size": 16, "agreement_layers": agreement_layers, **options})
    return RetroLM(tiny_model("llama", vocab_size=600), tiny_tokenizer(), config=config, method=method)


def test_all_layers_attend_the_pages_agreed_on() -> None:
    found = make().read(STORY * 6).retrieve(QUESTIONS[0])
    assert all(torch.equal(row, found.page_ids[0]) for row in found.page_ids)
    apart = make(agreement_layers=0).read(STORY * 6).retrieve(QUESTIONS[0])
    assert not all(torch.equal(row, apart.page_ids[1]) for row in apart.page_ids[1:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"retrieve_every": 3},
        {"selection_scope": "head"},
        {"store_bits": 8},
        {"page_positions": "ranked_for_questions"},
        {"page_positions": "ranked_for_questions", "retrieve_every": 3},
    ],
    ids=str,
)
def test_in_a_batch_and_beyond_the_device_as_alone(options: dict[str, Any]) -> None:
    pairs = list(zip([STORY * 6, STORY[60:] * 5], QUESTIONS, strict=True))
    alone = [make(**options).read(text).ask(question).token_ids for text, question in pairs]
    lm, capped = make(**options), make(**options, device_kv_bytes=400_000)
    together = lm.ask_batch([(lm.read(text), question) for text, question in pairs])
    assert [answer.token_ids for answer in together] == alone
    assert [capped.read(text).ask(question).token_ids for text, question in pairs] == alone


@pytest.mark.parametrize("positions", ["compact", "ranked_for_questions"])
def test_nothing_changes_where_all_pages_fit(positions: str) -> None:
    settings = [{"agreement_layers": 0}, {"agreement_layers": 2, "page_positions": positions}]
    answers = [make(kv_budget=512, **options).read(STORY).ask(QUESTIONS[0]) for options in settings]
    assert answers[0].token_ids == answers[1].token_ids


def test_ranked_pages_are_told_in_the_order_of_the_text() -> None:
    found = make(page_positions="ranked_for_questions").read(STORY * 6).retrieve(QUESTIONS[0])
    assert torch.equal(found.page_ids.sort(1).values, found.page_ids)


def test_the_mean_of_standardised_scores() -> None:
    def choice(scores: list[float] | None) -> LayerChoice:
        return LayerChoice(torch.tensor([0]), None if scores is None else torch.tensor(scores), 0)

    layers = [choice([9.0, 9, 9, 9, 9]), choice([5.0, 0, 2, 4, 7]), choice(None), choice([0.0, 30, 20, 10, 0])]
    both, last = (agreed_scores(layers, num_layers, num_sink=1, num_local=1) for num_layers in (2, 1))
    assert both is not None and torch.allclose(both[1:4], torch.zeros(3), atol=1e-6)
    assert last is not None and torch.allclose(last[1:4], torch.tensor([1.0, 0, -1]) * 1.5**0.5, atol=1e-6)
    assert agreed_scores([choice(None)], 1, 1, 1) is None and agreed_scores(layers, 2, num_sink=2, num_local=2) is None


def test_a_layer_whose_scores_tie_has_no_say() -> None:
    """Rounding, standardised, would weigh as much as what another layer knows."""
    tied = torch.full((5,), 3.0) + torch.tensor([0, 1e-6, -1e-6, 0, 0])
    told = torch.tensor([0.0, 30, 20, 10, 0])
    both, alone = agreement(torch.stack([tied, told]), 1, 1), agreement(told[None], 1, 1)
    assert both is not None and alone is not None and torch.allclose(2 * both[1:4], alone[1:4])


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("retrolm", {}, 8),
        ("retrolm", {"agreement_layers": 3}, 3),
        ("retrolm", {"selection_scope": "head"}, 0),
        ("quest_pages", {}, 0),
        ("retrolm_retro", {}, 0),
    ],
)
def test_each_method_has_a_default(method: str, options: dict[str, Any], expected: int) -> None:
    config = RetroConfig(**{"kv_budget": 192, "page_size": 16, **options})
    lm = RetroLM(tiny_model("llama", vocab_size=600), tiny_tokenizer(), config=config, method=method)
    assert lm.config.agreement_layers == expected


def test_a_method_that_revises_pages_refuses_it() -> None:
    lm = make("retrolm_retro", retrieve_every=4)
    with pytest.raises(UserError, match="agreement_layers=0"):
        lm.read(STORY * 6).ask(QUESTIONS[0])
    lm = make("retrolm_retro", agreement_layers=0, retrieve_every=4, page_positions="ranked_for_questions")
    with pytest.raises(UserError, match="page_positions='compact'"):
        lm.read(STORY * 6).ask(QUESTIONS[0])
    with pytest.raises(UserError, match="agreement_layers must be a whole number of at least 0, got -1"):
        make(agreement_layers=-1)


@pytest.mark.parametrize(("text", "budget", "expected"), [(STORY, 512, 1), (STORY * 6, 192, 2)])
def test_a_question_is_encoded_twice_only_where_pages_are_left_out(
    text: str, budget: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = make(kv_budget=budget).read(text)
    calls, encode = [], Encoder.encode

    def counted(self: Encoder, chunk: Any, *args: Any, **options: Any) -> Any:
        calls.append(chunk)
        return encode(self, chunk, *args, **options)

    monkeypatch.setattr(Encoder, "encode", counted)
    document.retrieve(QUESTIONS[0])
    assert len(calls) == expected
