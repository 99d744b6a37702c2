"""F1: with a budget that covers the text RetroLM is the stock model, whatever the family, page size and chunk size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grids import pairs
from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from tiny_models import LONGROPE, MODELS, ORIGINAL, random_ids, stock_logits, tiny_model

W = 8


def difference(model: object, ids: Tensor, **options: object) -> float:
    """Largest logit difference between RetroLM, page by page unless told otherwise, and the stock model."""
    lm = RetroLM(model, config=RetroConfig.from_options({"dense_bypass": False, **options}))
    expected = stock_logits(model, ids)
    found = lm.logits(ids)
    lm.detach()
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("num_tokens", [5 * W, 5 * W + 1, 17 * W - 1, W - 3])
def test_logits_equal_the_stock_model(name: str, num_tokens: int) -> None:
    if name == "phi3-longrope":  # the frequency set is fixed by the budget, the stock model's by the text
        num_tokens += ORIGINAL
    assert difference(tiny_model(name), random_ids(num_tokens), kv_budget=200, page_size=W, chunk_pages=3) <= 1e-6


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("num_tokens", [5 * W + 1, 17 * W - 1])
def test_dense_blocks_equal_the_stock_model(name: str, num_tokens: int) -> None:
    """Chunks that leave nothing out attend as one block: the first of a text, and those behind others."""
    if name == "phi3-longrope":
        num_tokens += ORIGINAL
    ids, options = random_ids(num_tokens), {"kv_budget": 200, "page_size": W, "dense_bypass": True}
    assert all(difference(tiny_model(name), ids, **options, chunk_pages=chunk) <= 1e-6 for chunk in (5, 100))


@pytest.mark.parametrize(
    ("name", "page_size", "chunk_pages"), pairs(["llama", "gemma2", "mistral-sliding"], [5, 16, 64], [1, 2, 16])
)
def test_page_and_chunk_size_change_nothing(name: str, page_size: int, chunk_pages: int) -> None:
    assert (
        difference(tiny_model(name), random_ids(77), kv_budget=192, page_size=page_size, chunk_pages=chunk_pages)
        <= 1e-6
    )


@pytest.mark.parametrize("num_tokens", [7 * W - 3, 7 * W, 7 * W + 1])
@pytest.mark.parametrize("strict", [True, False])
def test_budget_of_exactly_the_text(num_tokens: int, strict: bool) -> None:
    assert (
        difference(tiny_model("llama"), random_ids(num_tokens), kv_budget=num_tokens, page_size=W, strict_budget=strict)
        == 0.0
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_float32(name: str) -> None:
    assert difference(tiny_model(name, dtype=torch.float32), random_ids(101), kv_budget=128, page_size=W) <= 1e-4


@pytest.mark.parametrize("name", ["llama-yarn", "phi3-longrope", "qwen2", "gemma3"])
def test_half_precision_is_close(name: str) -> None:
    """Also attention factors that bfloat16 rounds are no reason to refuse a model."""
    assert difference(tiny_model(name, dtype=torch.bfloat16), random_ids(90), kv_budget=128, page_size=W) <= 0.5


def test_long_longrope_set_holds_for_short_texts_too() -> None:
    """The table begins shorter than the original window; what is read first must use the long factors already."""
    rope = {**LONGROPE, "original_max_position_embeddings": 270}
    model = tiny_model("phi3-longrope", original_max_position_embeddings=270, rope_parameters=rope)
    assert difference(model, random_ids(290), kv_budget=296, page_size=W, chunk_pages=4) <= 1e-6


def test_short_longrope_set() -> None:
    ids = random_ids(ORIGINAL - W)
    assert difference(tiny_model("phi3-longrope"), ids, kv_budget=ORIGINAL - W, page_size=W) <= 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_plain_model_is_exact(seed: int) -> None:
    assert difference(tiny_model("llama", seed), random_ids(90, seed), kv_budget=96, page_size=W) == 0.0
