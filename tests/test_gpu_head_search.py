"""Looking for retrieval heads, low-rank keys and reading questions on a GPU: as on the CPU, in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.engine.question_reading import read_questions
from retrolm.engine.repeat_reading import repeat_scores
from retrolm.methods.shadowkv import low_rank
from retrolm.methods.token_base import RepeatScores, RepeatText
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.gpu


def scores_of(model: Any, text: RepeatText) -> RepeatScores:
    lm = RetroLM(model, config=RetroConfig(kv_budget=64, page_size=8), method="razor_attention")
    return repeat_scores(lm.backbone, lm.attachment, text)


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "gemma2", "mistral-sliding"])
def test_heads_look_back_alike_on_both(family: str) -> None:
    here = scores_of(tiny_model(family), RepeatText(40, 4))
    there = scores_of(tiny_model(family).cuda(), RepeatText(40, 4))
    assert torch.allclose(here.echo_LK, there.echo_LK, atol=1e-5)
    assert torch.allclose(here.induction_LK, there.induction_LK, atol=1e-5)


def test_the_published_text_is_read_in_blocks() -> None:
    """10,000 tokens of bfloat16: a T × T matrix of float32 for 14 heads would take 5.6 GB, and marks as much again."""
    shape = {"num_hidden_layers": 2, "hidden_size": 896, "num_attention_heads": 14, "head_dim": 64}
    model = tiny_model("qwen2", dtype=torch.bfloat16, max_position_embeddings=32_768, **shape).cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = scores_of(model, RepeatText())
    assert found.echo_LK.isfinite().all() and 0 < float(found.echo_LK.max()) < 1
    assert torch.cuda.max_memory_allocated() - before < 3e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_keys_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    rows = torch.randn(4096, 160, generator=make) @ torch.randn(160, 1024, generator=make)
    keys = rows.unflatten(1, (8, 128)).transpose(0, 1).to(dtype)
    keys[..., 5] += 50  # a channel with a large bias, as Qwen2's
    here, there = low_rank(keys, 161), low_rank(keys.cuda(), 161).cpu()
    bar = 2e-3 if dtype == torch.float32 else 1e-2  # of the keys' size; a GPU's SVD goes another way
    assert (here.float() - there.float()).abs().max() < bar * here.float().abs().max()


def test_questions_are_those_of_the_cpu() -> None:
    heard = []
    for model in (tiny_model("gemma3"), tiny_model("gemma3").cuda()):
        lm = RetroLM(model, config=RetroConfig(kv_budget=64, page_size=8), method="actqkv")
        questions = [random_ids(length, length).tolist() for length in (30, 7)]
        heard.append(read_questions(lm.backbone, lm.attachment, questions, lm.pad_id))
    for layer, found in heard[0].items():
        other = heard[1][layer]
        assert torch.equal(found.there_BQ, other.there_BQ.cpu())
        queries = found.there_BQ[:, None, :, None] * (found.q_BHQD - other.q_BHQD.cpu())
        assert queries.abs().max() < 1e-5
