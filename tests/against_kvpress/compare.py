"""Our methods against what kvpress kept and computed (`make test-kvpress`, which runs `dump.py` first).

Not named test_*: it needs the folder that `dump.py` writes, in the environment variable KVPRESS_DUMP.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.engine.prune import generate_pruned
from retrolm.engine.prune_pass import PrunePrompt
from retrolm.methods import METHODS
from retrolm.methods.prune_base import PromptStates, PruneMethod

FOLDER = Path(os.environ["KVPRESS_DUMP"])
MODELS = sorted(path.parent.name for path in FOLDER.glob("*/reference.safetensors"))
BUDGET = 40
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv": ("snapkv", {"observation_window": 8, "pool": "avg", "pool_size": 5}),
    "snapkv-wide": ("snapkv", {"observation_window": 16, "pool": "avg", "pool_size": 9}),
    "pyramidkv": ("pyramidkv", {"observation_window": 8, "pool": "avg", "pool_size": 5, "beta": 4}),
    "streaming": ("streaming_postfill", {}),
    "streaming-rerotated": ("streaming_postfill", {"positions": "compact"}),
    "tova": ("tova", {}),
    "observed": ("h2o", {"normalise": True, "num_recent": 0}),
}


class Forced(LogitsProcessor):
    """Makes a given answer come out."""

    def __init__(self, answer: list[int]) -> None:
        self._answer = iter(answer)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([next(self._answer)]), 0.0)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", MODELS)
def test_same_sets_and_logits(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_file(FOLDER / name / "reference.safetensors")
    sizes = [reference[f"{case}.kept.{layer}"].shape[1] for layer in range(4)]
    method_name, knobs = CASES[case]
    method = METHODS.get(method_name).with_options(knobs)
    assert isinstance(method, PruneMethod)
    if case == "pyramidkv":  # kvpress counts the window inside the sizes, and rounds them its own way
        monkeypatch.setattr(type(method), "split_budget", lambda self, tokens, layers, budget: sizes)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float64)
    kept, logits = _run(model, method, reference, monkeypatch)
    for layer in range(4):
        assert torch.equal(kept[layer][0], reference[f"{case}.kept.{layer}"]), f"layer {layer}"
    assert (logits - reference[f"{case}.logits"]).abs().max() < 5e-5  # angles and eager softmax are float32 there


@pytest.mark.parametrize("name", MODELS)
def test_pyramid_sizes_agree_up_to_rounding(name: str) -> None:
    """Ours add the window to each layer's choice, as the authors do; kvpress counts it inside."""
    reference = load_file(FOLDER / name / "reference.safetensors")
    theirs = [reference[f"pyramidkv.kept.{layer}"].shape[1] for layer in range(4)]
    method = METHODS.get("pyramidkv").with_options(CASES["pyramidkv"][1])
    assert isinstance(method, PruneMethod)
    ours = method.layer_budgets(len(reference["ids"]), 4, BUDGET + 8)
    assert all(abs(mine - 8 - other) <= 2 for mine, other in zip(ours, theirs, strict=True))


def _run(
    model: Any, method: PruneMethod, reference: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], Tensor]:
    """Places kept in each layer [1, K, n], and logits [step, vocabulary] of the forced answer."""
    lm = RetroLM(model, config=RetroConfig(kv_budget=BUDGET, page_size=8), method="full")
    kept, logits = list[Tensor](), list[Tensor]()
    compress = type(method).compress

    def noted(self: PruneMethod, prompt: PromptStates, num_kept: int) -> Tensor:
        kept.append(compress(self, prompt, num_kept))
        return kept[-1]

    monkeypatch.setattr(type(method), "compress", noted)
    model.register_forward_hook(lambda module, args, out: logits.append(out.logits[0, -1]))
    answer, prompt = reference["answer"].tolist(), PrunePrompt(reference["ids"].tolist(), 0)
    options = {"max_new_tokens": len(answer), "do_sample": False, "logits_processor": [Forced(answer)]}
    generate_pruned(lm, method, [prompt], kv_budget=BUDGET, **options)
    return kept, torch.stack(logits)
