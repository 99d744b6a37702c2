"""Variants of every kind of method: their facts name their knobs, and no budget where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from retrolm.config import RetroConfig
from retrolm.evaluation.answering import LocalAnswerer
from retrolm.evaluation.rows import cell_identity, digest
from retrolm.evaluation.variants import Variant, VariantLoader, settings_of, variants_of
from tiny_eval import CONFIG, PROVENANCE, story_sample, story_set, tiny_lm


def test_only_methods_with_a_budget_get_one() -> None:
    found = variants_of(["full", "streaming_llm", "retrolm"], [64, 128], ["none"])
    assert found == [
        Variant("full"),
        Variant("streaming_llm", 64),
        Variant("streaming_llm", 128),
        Variant("retrolm", 64, "none"),
        Variant("retrolm", 128, "none"),
    ]


def test_facts_name_knobs_and_only_options_that_matter() -> None:
    plain = VariantLoader(tiny_lm(), "tiny", CONFIG)
    set_ = VariantLoader(tiny_lm(), "tiny", CONFIG, method_options={"streaming_llm": {"num_sink": 9}})
    variant, task = Variant("streaming_llm", 64), story_set(1).task
    default, changed = plain.open(variant).facts, set_.open(variant).facts
    assert (default["knobs"], changed["knobs"]) == ({"num_sink": 4}, {"num_sink": 9})
    assert default["options"] == {"prefix_page": True} and default["prefill"] == "streaming"
    assert digest(cell_identity(task, None, 0, default)) != digest(cell_identity(task, None, 0, changed))
    pages = plain.open(Variant("recency", 64)).facts
    assert "knobs" not in pages and "first_layer_mode" in pages["options"]
    assert plain.open(Variant("quest", 64)).facts["prefill"] == "dense"


@pytest.mark.parametrize(
    ("method", "options", "knobs", "expected"),
    [
        ("retrolm", {}, {}, ""),
        ("retrolm", {"agreement_layers": 0}, {}, "agreement_layers=0"),
        ("retrolm", {"agreement_layers": 8}, {}, ""),
        ("retrolm", {"word_weight": 0}, {}, "word_weight=0.0"),
        ("retrolm", {"word_weight": 1}, {}, ""),
        ("retrolm", {"whole_sentences": False}, {}, "whole_sentences=False"),
        ("retrolm", {"word_weight": 0, "whole_sentences": False}, {}, "word_weight=0.0"),
        ("recency", {"first_layer_mode": "full"}, {}, "first_layer_mode=full"),
        ("full", {"first_layer_mode": "full"}, {}, ""),
        ("streaming_llm", {}, {"num_sink": 9}, "streaming_llm.num_sink=9"),
    ],
)
def test_settings_are_what_differs_from_the_defaults(
    method: str, options: dict[str, Any], knobs: dict[str, Any], expected: str
) -> None:
    config = RetroConfig(**options)
    loader = VariantLoader(tiny_lm(), "tiny", config, method_options={method: knobs})
    budget = 512 if method != "full" else None
    assert settings_of(loader.open(Variant(method, budget, "none" if method == "retrolm" else None)).facts) == expected


def test_rows_say_what_each_layer_attended_and_kept() -> None:
    answerer = LocalAnswerer(VariantLoader(tiny_lm(), "tiny", CONFIG), PROVENANCE)
    (answered,) = answerer.answer(Variant("streaming_llm", 64), [story_sample(0, 900)])
    outcome = answered.outcome
    assert not isinstance(outcome, str)
    assert outcome.attended_tokens == {"prefill": 64, "decode": 64} and outcome.num_tokens > 200
    assert outcome.attended_by_layer == {"prefill": [64] * 4, "decode": [64] * 4}
    assert outcome.kv_bytes["device"] > 0 and outcome.kv_bytes["host"] == 0
    assert outcome.ttft_s > outcome.prefill_s > 0
