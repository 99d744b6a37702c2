"""Token methods and attention-based page indexes on a GPU: the CPU's answers, long bfloat16 prompts side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kept_logits import KeptLogits
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.results import Answer
from retrolm.methods import METHODS
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.gpu
TOKENS = [name for name in METHODS if METHODS.get(name).kind == "tokens"]
INDEXES = ["oracle", "infllm_pages"]
# The shape of a 0.5B Qwen2 with four layers.
SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 65_536,
}


def ask(model: Any, name: str, rows: list[Tensor], kv_budget: int, page_size: int) -> tuple[list[Answer], Tensor]:
    """Answers of four tokens, and their logits [B, 4, vocabulary]."""
    lm, steps = RetroLM(model, config=RetroConfig(kv_budget=kv_budget, page_size=page_size), method=name), []

    def note(input_ids: Tensor, scores: Tensor) -> Tensor:
        steps.append(scores.cpu())
        return scores

    prompts = [Prompt((), tuple(ids[:-4].tolist()), tuple(ids[-4:].tolist())) for ids in rows]
    try:
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "logits_processor": [note]}
        return lm.answer(prompts, max_new_tokens=4, **options), torch.stack(steps, 1)
    finally:
        lm.detach()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral-sliding"])
@pytest.mark.parametrize("name", [*TOKENS, *INDEXES])
def test_a_gpu_attends_and_computes_what_the_cpu_does(name: str, family: str) -> None:
    rows = [random_ids(length, length) for length in (150, 90, 30)]
    here, expected = ask(tiny_model(family), name, rows, 80, 8)
    there, logits = ask(tiny_model(family).cuda(), name, rows, 80, 8)
    assert [one.attended_by_layer for one in there] == [one.attended_by_layer for one in here]
    assert [one.token_ids for one in there] == [one.token_ids for one in here]
    assert (logits - expected).abs().max() < 1e-5  # angles are float32, and a device rounds them its own way


@pytest.mark.parametrize("name", TOKENS)
def test_long_prompts_side_by_side_in_bfloat16(name: str) -> None:
    """Eight prompts of about 16K tokens stay under 12 GB beside the weights; a T × T matrix of one head has 0.5."""
    model = tiny_model("qwen2", dtype=torch.bfloat16, **SHAPE).cuda()
    rows = [random_ids(16_384 - 37 * i, i) for i in range(8)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    answers, logits = ask(model, name, rows, 2048, 128)
    assert logits.isfinite().all()
    if METHODS.get(name).has_budget:
        assert all(answer.attended_tokens["decode"] <= 2048 for answer in answers)
    assert torch.cuda.max_memory_allocated() - before < 12e9


@pytest.mark.parametrize("name", ["streaming_llm", "lm_infinite"])
def test_the_captured_ring_does_what_generate_does(name: str) -> None:
    """Prompts longer and shorter than the budget; the second answer replays the graph of the first."""
    model = tiny_model("qwen2", dtype=torch.float32).cuda()
    lm = RetroLM(model, config=RetroConfig(kv_budget=40, page_size=8), method=name)
    for lengths in ((150, 30, 41), (90, 60, 20)):
        prompts = [Prompt((), tuple(random_ids(length, length).tolist()), (5,)) for length in lengths]
        found = []
        for decoding in ("fast", "plain"):
            keep = KeptLogits()
            options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "logits_processor": [keep]}
            answers = lm.answer(prompts, max_new_tokens=60, decoding=decoding, **options)
            found.append((answers, torch.stack(keep.steps)))
        (fast, logits), (plain, expected) = found
        assert fast[0].decode_path == "fused layers, CUDA graph" and plain[0].decode_path == "generate"
        assert [one.token_ids for one in fast] == [one.token_ids for one in plain]
        assert [one.attended_by_layer for one in fast] == [one.attended_by_layer for one in plain]
        assert (logits - expected).abs().max() < 1e-3
    lm.detach()
