"""On a GPU the captured step generates what transformers' `generate` generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.decode_step import fused_obstacle
from retrolm.engine.fast_decode import Runner, fast_decode_of
from retrolm.engine.model import RetroLM
from test_fast_decode import FIXED, W, scramble
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.gpu


def attach(
    name: str, dtype: torch.dtype = torch.float32, model: dict[str, Any] | None = None, **options: Any
) -> RetroLM:
    options = {"kv_budget": 64, "page_size": W, **options}
    return RetroLM(tiny_model(name, dtype=dtype, **(model or {})).cuda(), config=RetroConfig.from_options(options))


def generated(lm: RetroLM, ids: Tensor, **options: Any) -> list[list[int]]:
    out = lm.generate(ids.cuda(), max_new_tokens=25, do_sample=False, eos_token_id=[], **options)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("name", "batch"), [*((name, 1) for name in FIXED), ("gemma3", 3), ("qwen3", 3), ("llama", 32)]
)
def test_greedy_tokens_equal_generate(name: str, batch: int) -> None:
    lm = attach(name)
    ids = torch.stack([random_ids(150, seed) for seed in range(batch)])
    fast, plain = generated(lm, ids, decoding="fast"), generated(lm, ids, decoding="plain")
    same = sum(a == b for a, b in zip(fast, plain, strict=True))
    assert same >= batch - batch // 16  # in float32 a near tie may fall either way


def test_it_is_the_default_on_a_gpu_and_says_so() -> None:
    lm = attach("llama")
    generated(lm, random_ids(90)[None])
    (runner,) = fast_decode_of(lm.attachment, lm.backbone)._runners.values()
    assert runner.path == "fused layers, CUDA graph"


def test_sampling_follows_the_seed() -> None:
    lm = attach("llama")
    ids = random_ids(90)[None].cuda()
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(lm.generate(ids, max_new_tokens=20, do_sample=True, decoding="fast").tolist())
    assert outs[0] == outs[1]


def test_retrieving_again_refills_the_same_graph() -> None:
    lm = attach("llama", retrieve_every=5)
    ids = random_ids(90)[None]
    fast = generated(lm, ids, decoding="fast")
    runners = list(fast_decode_of(lm.attachment, lm.backbone)._runners.values())
    assert fast == generated(lm, ids, decoding="plain")
    assert generated(lm, ids, decoding="fast") == fast
    assert list(fast_decode_of(lm.attachment, lm.backbone)._runners.values()) == runners and len(runners) == 1


SHAPES: list[dict[str, Any]] = [
    {"hidden_size": 512, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1100},
    {"hidden_size": 896, "head_dim": 96, "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 256},
    {
        "hidden_size": 1024,
        "head_dim": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
    },
]


LAYER_CASES = [
    *(("llama", shape, torch.bfloat16, batch) for shape in SHAPES for batch in (1, 16)),
    *((name, SHAPES[2], dtype, 1) for name in ("qwen2", "qwen3") for dtype in (torch.float32, torch.float16)),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "batch"), LAYER_CASES)
def test_fused_layers_equal_stock_layers(name: str, shape: dict[str, Any], dtype: torch.dtype, batch: int) -> None:
    """Against the stock layers over the same cache in float32: as near as the stock layers in the same dtype."""
    lm, exact = attach(name, dtype, shape), attach(name, torch.float32, shape)
    assert fused_obstacle(lm.backbone) is None
    found = [_steps(lm, batch, fused=True), _steps(lm, batch, fused=False), _steps(exact, batch, fused=False)]
    ours, stock = ((x - found[2]).abs().max() for x in found[:2])
    assert ours <= max(3 * float(stock), 1e-4 * float(found[2].abs().max()))


def _steps(lm: RetroLM, batch: int, fused: bool) -> Tensor:
    runner = Runner(lm.backbone, batch, places=512, fused=fused)
    with torch.no_grad(), lm.attachment.run(runner.program):
        runner.prepare()
        scramble(runner.cache)
        return torch.stack([runner.step().float().clone() for _ in range(3)])
