"""The engine's own layers of a reading pass against the stock model's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grids import some
from retrolm.config import RetroConfig
from retrolm.engine import encoder, prefill_layers
from retrolm.engine.model import RetroLM
from retrolm.ops.prefill_layer import add_rms_norm, silu_times
from test_against_naive import random_retriever
from tiny_models import MODELS, random_ids, tiny_model

FUSED = ["llama", "mistral-sliding", "qwen2", "qwen3"]


def make(name: str, **options: Any) -> RetroLM:
    config = RetroConfig.from_options({"kv_budget": 40, "page_size": 8, "chunk_pages": 5, **options})
    lm = RetroLM(tiny_model(name), config=config)
    lm.use_retriever(random_retriever(lm, 4))
    return lm


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take the engine's own layers on this device, too; the list gets one entry per pass that did."""
    taken: list[str] = []

    def noted(*args: Any) -> Any:
        taken.append("pass")
        return prefill_layers.fused_rows(*args)

    monkeypatch.setattr(encoder, "can_fuse", prefill_layers.is_plain)
    monkeypatch.setattr(encoder, "fused_rows", noted)
    return taken


@pytest.mark.parametrize(("name", "rows"), some(FUSED, [7, 4096], each=1))
def test_logits_and_answers_are_the_stock_layers(
    name: str, rows: int, fused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the MLP runs over a few rows at a time."""
    monkeypatch.setattr(prefill_layers, "_MLP_INNER", rows * 64)
    ids, lm = random_ids(163), make(name)
    logits = lm.logits(ids)
    tokens = lm.generate(ids[None], max_new_tokens=12, do_sample=False)
    assert len(fused) >= 5
    monkeypatch.setattr(encoder, "can_fuse", lambda backbone: False)
    assert difference(logits, lm.logits(ids)) <= 1e-6
    assert torch.equal(tokens, lm.generate(ids[None], max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FUSED])
def test_other_models_run_their_own_layers(name: str, fused: list[str]) -> None:
    config = RetroConfig(kv_budget=200, page_size=8)
    logits = RetroLM(tiny_model(name), config=config).logits(random_ids(60))
    assert logits.isfinite().all() and not (fused and not prefill_layers.is_plain(make(name).backbone))


def test_watched_modules_run_as_they_are(fused: list[str]) -> None:
    lm, seen = make("llama"), []
    handle = lm.model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    lm.read(random_ids(80))
    assert seen and not fused
    handle.remove()
    lm.read(random_ids(80))
    assert fused


def test_taken_where_all_layers_are_on_one_device() -> None:
    lm = make("llama")
    assert prefill_layers.can_fuse(lm.backbone)
    lm.backbone.layers[2] = replace(lm.backbone.layers[2], device=torch.device("meta"))
    assert not prefill_layers.can_fuse(lm.backbone)


def test_norm_and_gate_are_those_of_the_stock_modules() -> None:
    x, more, weight = torch.randn(5, 48), torch.randn(5, 48), torch.randn(48)
    expected = nn.functional.rms_norm(x + more, (48,), weight, 1e-5)
    assert difference(add_rms_norm(x.clone(), more, weight, 1e-5), expected) <= 1e-5
    changed = x.clone()
    add_rms_norm(changed, more, weight, 1e-5)
    assert torch.equal(changed, x + more)
    assert difference(silu_times(x.clone(), more), nn.functional.silu(x) * more) == 0.0
