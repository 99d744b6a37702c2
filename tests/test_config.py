"""The space of options: what is allowed works, what is not is refused with a reason (hypothesis)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.methods import METHODS, PageMethod
from retrolm.methods.head_scores import ScoresHeads
from retrolm.methods.retro_exposure import Revises
from tiny_models import random_ids, tiny_model

MODEL = tiny_model("llama")
PAGE_METHODS = [name for name in METHODS if issubclass(METHODS.get(name), PageMethod)]

OPTIONS = st.fixed_dictionaries(
    {
        "page_size": st.integers(1, 20),
        "pages": st.integers(3, 7),
        "odd": st.integers(0, 5),
        "strict_budget": st.booleans(),
        "num_local_pages": st.integers(0, 4),
        "first_layer_mode": st.sampled_from(["recent", "mean_key", "full"]),
        "num_skip_layers": st.integers(0, 5),
        "bookmarks": st.sampled_from(["invisible", "visible"]),
        "bookmark_span": st.sampled_from(["sink_page", "page"]),
        "score_rope": st.booleans(),
        "selection_scope": st.sampled_from(["layer", "layer", "head"]),
        "causal_selection": st.booleans(),
        "page_positions": st.sampled_from(["compact", "ranked_for_questions", "true_for_questions", "true"]),
        "retrieve_every": st.sampled_from([0, 1, 3, 8]),
        "chunk_pages": st.integers(1, 9),
        "dense_bypass": st.booleans(),
        "store_dtype": st.sampled_from([None, "float32", "bfloat16"]),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options=OPTIONS, method=st.sampled_from(PAGE_METHODS), num_tokens=st.integers(1, 110), new=st.integers(1, 10))
def test_every_combination_reads_and_generates(options: dict[str, Any], method: str, num_tokens: int, new: int) -> None:
    if not METHODS.get(method).needs_bookmarks:
        options["bookmarks"] = "invisible"
    size = options["page_size"] + (options["bookmarks"] == "visible")
    budget = options.pop("pages") * size + options.pop("odd")
    if budget < 4 * size or options["retrieve_every"] > options["page_size"]:
        options["retrieve_every"] = 0
    if not issubclass(METHODS.get(method), ScoresHeads) or options["retrieve_every"]:
        options["selection_scope"] = "layer"
    if issubclass(METHODS.get(method), Revises) and options["page_positions"] == "ranked_for_questions":
        options["page_positions"] = "compact"  # a union of choices has no order of its own
    lm = RetroLM(MODEL, config=RetroConfig(kv_budget=budget, **options), method=method)
    ids = random_ids(num_tokens)
    try:
        logits = lm.logits(ids)
        assert logits.shape == (num_tokens, 128) and logits.isfinite().all()
        out = lm.generate(ids[None], max_new_tokens=new, do_sample=False, eos_token_id=None)
        assert out.shape == (1, num_tokens + new) and torch.equal(out[0, :num_tokens], ids)
    finally:
        lm.detach()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_budget": 0}, "kv_budget must be a whole number of at least 1"),
        ({"page_size": 0}, "page_size must be a whole number of at least 1, got 0"),
        ({"page_size": -8}, "page_size"),
        ({"page_size": 12.5}, "page_size"),
        ({"page_size": True}, "page_size"),
        ({"kv_budget": "2048"}, "kv_budget"),
        ({"chunk_pages": -1}, "chunk_pages"),
        ({"num_local_pages": -1}, "num_local_pages"),
        ({"retrieve_every": -1}, "retrieve_every"),
        ({"kv_budget": 300, "page_size": 128}, r"under 3 pages of 128 tokens.*at least 384"),
        ({"device_kv_bytes": 0}, "device_kv_bytes must be positive"),
        ({"first_layer_mode": "ful"}, "Did you mean 'full'"),
        ({"bookmark_span": "sink"}, "sink_page"),
        ({"store_dtype": "float8"}, "bfloat16"),
        ({"kv_buget": 512}, "Did you mean 'kv_budget'"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RetroConfig.from_options(options)


def test_methods_without_scores_of_heads_are_refused() -> None:
    lm = RetroLM(MODEL, config=RetroConfig(kv_budget=24, page_size=8, selection_scope="head"), method="recency")
    with pytest.raises(UserError, match="'recency' scores pages for all heads"):
        lm.logits(random_ids(50))
    lm.detach()


def test_replace_checks_too() -> None:
    config = RetroConfig()
    assert config.replace(kv_budget=4096).kv_budget == 4096 and config.kv_budget == 2048
    with pytest.raises(UserError):
        config.replace(page_size=1000)
    with pytest.raises(UserError, match="Did you mean"):
        config.replace(kv_budgt=1)


@pytest.mark.parametrize("options", [{"device_kv_bytes": "4GB"}, {"device_kv_bytes": 0.5}, {"strict_budget": "no"}])
def test_values_of_another_type_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        RetroConfig.from_options(options)
