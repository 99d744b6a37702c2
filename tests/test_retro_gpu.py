"""Revised tokens and pages, and dictated rows, on a GPU: the CPU's figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.evaluation.dictation import Dictation
from retrolm.methods.retro_exposure import ExposureMeter
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.gpu
NEW = 18
COLUMNS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("quest_retro", {"page": 4, "num_dense_layers": 1, "window": 3}),
    ("quest_retro", {"page": 4, "num_dense_layers": 1, "window": 3, "partials": "recomputed"}),
    ("retrolm_retro", {"window": 3}),
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(("method", "knobs"), COLUMNS)
def test_a_gpu_measures_what_the_cpu_does(method: str, knobs: dict[str, Any], family: str) -> None:
    here, there = (measure(tiny_model(family).to(device), method, knobs) for device in ("cpu", "cuda"))
    for one, other in zip(here[:2], there[:2], strict=True):
        assert torch.equal(one, other)
    assert (here[2] - there[2]).abs().max() < 1e-5 and here[3] == pytest.approx(there[3])


def measure(
    model: Any, method: str, knobs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[float]]:
    """What rows said, whether they agreed, their losses, and their exposure: one row told what to say, one free."""
    config = RetroConfig(kv_budget=40, page_size=8, retrieve_every=4)
    lm = RetroLM(model, config=config, method=method, method_options=knobs)
    meter = lm.method.meter = ExposureMeter()
    ids = random_ids(90, seed=5).tolist()
    dictation = Dictation(random_ids(NEW, seed=9)[None], 2, NEW, lm.eos_ids)
    prompts = [Prompt((), tuple(ids[:-4]), tuple(ids[-4:]))] * 2
    lm.answer(prompts, max_new_tokens=NEW, do_sample=False, logits_processor=[dictation], eos_token_id=None)
    lm.detach()
    return dictation.said(), dictation.agrees(), dictation.losses(), meter.by_sample()
