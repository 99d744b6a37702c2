"""Where reading's time goes, told apart by what ran inside the engine."""

from __future__ import annotations

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.engine.operator_shares import operator_shares
from tiny_models import random_ids, tiny_model


def test_shares_add_up_and_name_the_engines_own_operators() -> None:
    lm = RetroLM(tiny_model("llama", dtype=torch.float32), config=RetroConfig(kv_budget=40, page_size=8))
    found = operator_shares(lm, random_ids(120), num_largest=50)
    assert found.products + found.attention + found.stock + found.own == pytest.approx(1.0)
    assert min(found.products, found.attention, found.stock, found.own) > 0.005
    assert "index_select" in found.largest_own and "silu" not in found.largest_own
    assert sum(found.largest_own.values()) <= found.own and found.num_tokens == 120


def test_more_of_the_engines_work_shows_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from retrolm.engine.set_attention import SetAttention

    lm = RetroLM(tiny_model("llama", dtype=torch.float32), config=RetroConfig(kv_budget=40, page_size=8))
    stock = SetAttention._gather
    assert "sort" not in operator_shares(lm, random_ids(120)).largest_own

    def slow(self: SetAttention, *args: object) -> object:
        torch.zeros(200_000).sort()
        return stock(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SetAttention, "_gather", slow)
    after = operator_shares(lm, random_ids(120))
    assert next(iter(after.largest_own)) == "sort" and after.own > after.largest_own["sort"] > 0.1
