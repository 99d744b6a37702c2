"""However long the text, no position passes kv_budget + question + generated tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.chunk import Chunk
from retrolm.engine.model import RetroLM
from retrolm.engine.rope_table import RopeTable
from test_against_naive import random_retriever
from tiny_models import random_ids, tiny_model

W, BUDGET, QUESTION, NEW = 8, 40, 13, 9
WINDOW = 128  # positions of the models


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The highest position of each look into a RoPE table."""
    found: list[int] = []
    stock = RopeTable.at

    def watched(self: RopeTable, positions: Tensor) -> tuple[Tensor, Tensor]:
        found.append(int(positions.max()))
        return stock(self, positions)

    monkeypatch.setattr(RopeTable, "at", watched)
    return found


def make(name: str, **options: Any) -> RetroLM:
    config = RetroConfig.from_options({"kv_budget": BUDGET, "page_size": W, **options})
    lm = RetroLM(tiny_model(name, max_position_embeddings=WINDOW), config=config)
    lm.use_retriever(random_retriever(lm, 4))
    return lm


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2"])
def test_positions_of_a_text_six_times_the_window(name: str, strict: bool, bypass: bool, seen: list[int]) -> None:
    lm = make(name, strict_budget=strict, dense_bypass=bypass)
    of_generated: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        of_generated.append(int(kwargs["position_ids"].max() if "position_ids" in kwargs else args[1].max()))

    lm.model.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    text = random_ids(6 * WINDOW)
    lm.generate(torch.cat([text, random_ids(QUESTION, 1)])[None], max_new_tokens=NEW, do_sample=False, eos_token_id=[])
    own = lm.model.config.sliding_window + W if name == "gemma2" else 0  # its sliding layers keep their window
    assert max(seen) > BUDGET // 2 and max(*seen, *of_generated) < max(BUDGET, own) + W + NEW


def test_a_page_beyond_the_budget_is_caught() -> None:
    lm = make("llama")
    document = lm.read(random_ids(200))
    ids = document.encoder.parts.store.reserve(2)
    query = document.encoder.query(document.table, ids, random_ids(QUESTION).tolist())
    query.end = [BUDGET + 1]
    with pytest.raises(AssertionError, match=f"{BUDGET + 1}"):
        document.encoder.encode(Chunk([query], QUESTION))
