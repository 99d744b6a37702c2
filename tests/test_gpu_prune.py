"""Pruning on a GPU: what the CPU keeps and computes, and long prompts in bfloat16 without a T × T matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.engine.prune import Pruned, generate_pruned
from retrolm.engine.prune_pass import PrunePrompt
from retrolm.methods import METHODS
from retrolm.methods.prune_base import PruneMethod
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.gpu
NAMES = [name for name in METHODS if METHODS.get(name).kind == "prune"]
# Of the shape of a 0.5B Qwen2, but with few layers.
HALF_BILLION = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
}


def run(model: torch.nn.Module, name: str, prompts: list[list[int]], budget: int) -> tuple[list[Pruned], Tensor]:
    """Answers of three tokens, and the logits [step, sample, vocabulary]."""
    lm = RetroLM(model, config=RetroConfig(kv_budget=budget, page_size=8), method="full")
    method, logits = METHODS.get(name).with_options({}), list[Tensor]()
    assert isinstance(method, PruneMethod)
    handle = model.register_forward_hook(lambda module, args, out: logits.append(out.logits[:, -1].cpu()))
    rows = [PrunePrompt(ids, 4) for ids in prompts]
    try:
        found = generate_pruned(lm, method, rows, kv_budget=budget, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        return found, torch.stack(logits)
    finally:
        handle.remove()
        lm.detach()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral-sliding"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_keeps_and_computes_what_the_cpu_does(name: str, family: str) -> None:
    prompts = [random_ids(n, n).tolist() for n in (150, 90, 40)]
    here, expected = run(tiny_model(family), name, prompts, 64)
    there, logits = run(tiny_model(family).cuda(), name, prompts, 64)
    assert [one.kept for one in there] == [one.kept for one in here]
    assert [one.token_ids for one in there] == [one.token_ids for one in here]
    assert (logits - expected).abs().max() < 1e-5  # angles are float32, and a device rounds them its own way


@pytest.mark.parametrize("name", NAMES)
def test_long_prompts_in_bfloat16(name: str) -> None:
    """32K tokens: one layer's weights would take 30 GB at once; all of it stays far below."""
    model = tiny_model("qwen2", dtype=torch.bfloat16, num_hidden_layers=2, **HALF_BILLION).cuda()
    ids = random_ids(32_768).tolist()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (found,), logits = run(model, name, [ids], 2048)
    assert logits.isfinite().all() and sum(found.kept) == 2 * 2048
    assert torch.cuda.max_memory_allocated() - before < 4e9
    room = 256  # behind what is kept, for generated tokens
    assert found.kv_bytes < 2 * 2 * 2 * 64 * 2 * (2048 + room + 4)


@pytest.mark.parametrize("name", NAMES)
def test_the_captured_loop_answers_as_generate(name: str) -> None:
    """Ragged prompts, some shorter than the budget, then a longer batch over the same cache."""
    config = RetroConfig(kv_budget=64, page_size=8)
    lm = RetroLM(tiny_model("qwen2", dtype=torch.float32).cuda(), config=config, method="full")
    method = METHODS.get(name).with_options({})
    assert isinstance(method, PruneMethod)
    for lengths in ((150, 90, 40), (700, 333, 64)):
        rows = [PrunePrompt(random_ids(n, n).tolist(), 4) for n in lengths]
        options = {"kv_budget": 64, "max_new_tokens": 12, "do_sample": False, "eos_token_id": []}
        fast, plain = (generate_pruned(lm, method, rows, **options, decoding=way) for way in ("fast", "plain"))
        assert {one.decode_path for one in fast} == {"fused layers, CUDA graph"}
        assert [(one.kept, one.attended) for one in fast] == [(one.kept, one.attended) for one in plain]
        same = sum(a.token_ids == b.token_ids for a, b in zip(fast, plain, strict=True))
        assert same >= 2  # in float32 a near tie may fall either way
