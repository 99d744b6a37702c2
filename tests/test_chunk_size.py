"""How many pages one pass reads where nobody said."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine import chunk_size
from retrolm.engine.model import RetroLM
from retrolm.engine.random_model import load_shape
from tiny_models import tiny_model


def backbone(shape: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
    """What the choice looks at, of a model that is not made."""
    config = load_shape(shape)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return SimpleNamespace(
        config=config, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, hidden_size=config.hidden_size,
        dtype=dtype, layers=[SimpleNamespace(device=torch.device(device))] * 2,
    )  # fmt: skip


@pytest.mark.parametrize(("shape", "tokens", "wide_tokens"), [("llama-8b", 8192, 4096), ("qwen-0.5b", 32768, 32768)])
def test_a_gpu_reads_what_fits_and_fills_it(shape: str, tokens: int, wide_tokens: int) -> None:
    for page_size in (16, 128, 256):
        found = chunk_size.with_chunk_size(RetroConfig(page_size=page_size), backbone(shape))
        assert found.chunk_pages * page_size == tokens
        assert replace(found, chunk_pages=0) == RetroConfig(page_size=page_size)
    wide = chunk_size.with_chunk_size(RetroConfig(), backbone(shape, dtype=torch.float32))
    assert wide.chunk_pages * 128 == wide_tokens


def test_a_page_longer_than_a_pass_is_read_alone() -> None:
    huge = RetroConfig(page_size=100_000, kv_budget=400_000)
    assert chunk_size.with_chunk_size(huge, backbone("llama-8b")).chunk_pages == 1


def test_a_processor_reads_sixteen_and_what_is_said_holds() -> None:
    assert RetroLM(tiny_model("llama"), config=RetroConfig(kv_budget=64, page_size=8)).config.chunk_pages == 16
    for device in ("cpu", "cuda"):
        assert chunk_size.with_chunk_size(RetroConfig(chunk_pages=3), backbone("llama-8b", device)).chunk_pages == 3
