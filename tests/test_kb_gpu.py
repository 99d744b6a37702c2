"""Knowledge bases and the disk tier on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.knowledge_base.base import KnowledgeBase
from test_against_naive import random_retriever
from test_kb_base import QUESTION, same_pages, story
from tiny_models import random_ids, tiny_model
from tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.gpu


def on_gpu(dtype: torch.dtype = torch.float32, **options: object) -> RetroLM:
    model = tiny_model("llama", vocab_size=600, dtype=dtype).to("cuda")
    config = RetroConfig.from_options({"kv_budget": 128, "page_size": 8, "chunk_pages": 5, **options})
    lm = RetroLM(model, tiny_tokenizer(True), config=config)
    lm.use_retriever(random_retriever(lm, 2))
    return lm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_restored_document_is_the_one_that_was_read(dtype: torch.dtype, bits: int, tmp_path: Path) -> None:
    base = KnowledgeBase.create(tmp_path / "base", on_gpu(dtype, store_bits=bits))
    base.add(story(600), name="a")
    lm = on_gpu(dtype, store_bits=bits)
    session = lm.read(story(600))
    later = KnowledgeBase.open(tmp_path / "base", lm)
    assert same_pages(later.select("a"), session)
    found, expected = later.ask(QUESTION, max_new_tokens=8), session.ask(QUESTION, max_new_tokens=8)
    assert found.answer.token_ids == expected.token_ids
    base.add(story(500, 60), name="b")
    assert later.ask(QUESTION, max_new_tokens=4).reuse == "composed"


def test_a_base_made_on_a_gpu_is_asked_on_a_cpu(tmp_path: Path) -> None:
    KnowledgeBase.create(tmp_path / "base", on_gpu()).add(story(600), name="a")
    cpu = RetroLM(
        tiny_model("llama", vocab_size=600, dtype=torch.float32),
        tiny_tokenizer(True),
        config=RetroConfig(kv_budget=128, page_size=8, chunk_pages=5),
    )
    cpu.use_retriever(random_retriever(cpu, 2))
    assert KnowledgeBase.open(tmp_path / "base", cpu).ask(QUESTION, max_new_tokens=4).reuse == "exact"


def test_three_tiers_read_alike(tmp_path: Path) -> None:
    ids = random_ids(400)
    plain = on_gpu()
    unit = plain.page_layout().page_bytes * plain.backbone.num_layers
    capped = on_gpu(device_kv_bytes=24 * unit)
    capped.use_disk_tier(tmp_path, 28 * unit)
    assert torch.equal(plain.logits(ids), capped.logits(ids))
    held = capped.read(ids.tolist()).encoder.parts.store.bytes()
    assert held.device <= 24 * unit and held.host <= 28 * unit and held.disk >= 50 * unit
