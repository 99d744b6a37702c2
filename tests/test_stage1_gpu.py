"""Stage 1 on CUDA: fused kernels against the CPU's float32, no step that waits, reading ahead in a thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.dense_pass import dense_pass
from retrolm.engine.model import RetroLM
from retrolm.engine.streaming_states import streaming_states
from retrolm.ops.attention import attend_reference
from retrolm.ops.attention_lse import attend_lse, gives_lse
from retrolm.training.stage1.batches import Stage1Batch
from retrolm.training.stage1.speed import training_speed
from retrolm.training.stage1.step import Stage1Step
from stage1_run_maker import W, tiny_batch, tiny_recipe, tiny_trainer
from test_against_naive import random_retriever
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


def backbone(name: str, dtype: torch.dtype, device: torch.device) -> RetroLM:
    """A tiny chat model whose heads fit every fused kernel."""
    shape = {"vocab_size": 600, "max_position_embeddings": 1024, "hidden_size": 256}
    if name != "phi3":
        shape["head_dim"] = 64
    model = tiny_model(name, dtype=dtype, **shape).to(device)
    return RetroLM(model, tiny_tokenizer(), config=RetroConfig(kv_budget=3 * W, page_size=W))


def rivals_of(batch: Stage1Batch) -> Tensor:
    """All pages of other texts, bool [N, B * P]."""
    there = (batch.pages.text_lengths > 0).repeat(len(batch.sequence_N), 1, 1)
    there[torch.arange(len(there), device=there.device), batch.sequence_N] = False
    return there.flatten(1)


def scores_and_gradients(
    name: str, dtype: torch.dtype, device: torch.device, **levers: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Centred page scores of three texts with four questions each, and the gradients of the loss."""
    lm, recipe = backbone(name, dtype, device), tiny_recipe(**levers)
    step = Stage1Step(lm, random_retriever(lm, 0), recipe.train).to(device)
    batch = tiny_batch(recipe, num_further=3).to(device)
    batch.rival_NM = rivals_of(batch) if recipe.train.batch_negatives else None
    frozen = step.read(batch)
    found = step.scores(batch, frozen)
    step.judge(batch, found, frozen).loss.backward()
    scores = found.own_LKNP.detach().double().cpu()
    gradients = {key: p.grad.double().cpu() for key, p in step.named_parameters() if p.grad is not None}
    return scores - scores.mean(-1, keepdim=True), gradients


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3", "phi3", "gemma2", "mistral-sliding"])
def test_float32_is_that_of_the_cpu(name: str) -> None:
    levers = {"batch_negatives": 0.5, "teacher_share": 0.2}
    expected = scores_and_gradients(name, torch.float32, torch.device("cpu"), **levers)
    found = scores_and_gradients(name, torch.float32, DEVICE, **levers)
    assert (found[0] - expected[0]).abs().max() < 1e-3 * expected[0].abs().max()
    for key, value in expected[1].items():
        assert float((found[1][key] - value).norm()) < 1e-2 * float(value.norm().clamp(min=1e-6)), key


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])
def test_bfloat16_with_fused_kernels_is_close(name: str) -> None:
    """As close as on a CPU: these models are made to be sharp, and 8 bits are few."""
    expected = scores_and_gradients(name, torch.float32, torch.device("cpu"))
    found = scores_and_gradients(name, torch.bfloat16, DEVICE)
    assert float((found[0] - expected[0]).norm()) < 0.35 * float(expected[0].norm())
    together = [torch.cat([part[key].flatten() for key in expected[1]]) for part in (found[1], expected[1])]
    assert float(torch.cosine_similarity(*together, dim=0)) > 0.7


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_visible_bookmarks_train_in_bfloat16(name: str, tmp_path: Path) -> None:
    """Checkpointed layers run again with the kernels of the first time."""
    lm = backbone(name, torch.bfloat16, DEVICE)
    seeing = RetroLM(lm.model, lm.tokenizer, config=lm.config.replace(bookmarks="visible", kv_budget=512))
    trainer = tiny_trainer(tmp_path, seeing, dtype="bfloat16", bookmarks="visible", accumulate=1)
    batches = trainer.reading(iter([tiny_batch(trainer.recipe, num_further=3)]))
    norm = trainer.update(batches, more=False)[1]
    assert norm is not None and norm.isfinite() and norm > 0


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_its_log_sum_exp(causal: bool) -> None:
    q, k, v = (torch.randn(3, heads, 67, 64, dtype=torch.bfloat16, device=DEVICE) for heads in (14, 2, 2))
    assert gives_lse(q)
    k, v = (x if causal else torch.cat([x, x.flip(2)], 2)[:, :, :101] for x in (k, v))
    out, lse = attend_lse(q, k, v, 0.125, causal)
    allowed = torch.ones(1, 67, k.shape[2], dtype=torch.bool, device=DEVICE)
    allowed = allowed.tril() if causal else allowed
    wide = [x.float().transpose(1, 2) for x in (q, k, v)]
    assert torch.allclose(out.float(), attend_reference(*wide, allowed, 0.125).transpose(1, 2), atol=2e-2)
    logits = (q.float() @ k.float().repeat_interleave(7, 1).mT * 0.125).masked_fill(~allowed, -torch.inf)
    assert torch.allclose(lse.float(), logits.logsumexp(-1), atol=1e-2)


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])
def test_a_step_never_waits_for_the_device(name: str, tmp_path: Path) -> None:
    """PyTorch itself raises on anything that would."""
    levers: dict[str, Any] = {"batch_negatives": 1.0, "teacher_share": 0.1, "ema": 0.9}
    trainer = tiny_trainer(tmp_path, backbone(name, torch.bfloat16, DEVICE), dtype="bfloat16", accumulate=1, **levers)
    batch = tiny_batch(trainer.recipe, num_further=3)
    batch.rival_NM = rivals_of(batch)
    batch = batch.pin_memory()
    batches = trainer.reading(iter([batch] * 4))
    trainer.update(batches, more=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for more in (True, True, False):
            trainer.update(batches, more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.stop()


def test_reading_ahead_changes_no_weight(tmp_path: Path) -> None:
    """But for the order in which a kernel may add up."""
    found = []
    for ahead in (True, False):
        trainer = tiny_trainer(tmp_path / str(ahead), backbone("qwen2", torch.float32, DEVICE), accumulate=1)
        batch = tiny_batch(trainer.recipe, num_further=3)
        batches = trainer.reading(iter([batch] * 5), ahead)
        for number in range(5):
            trainer.update(batches, more=number < 4)
        batches.stop()
        found.append(torch.cat([p.detach().flatten() for p in trainer.step_module.parameters()]))
    assert torch.allclose(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "llama", "phi3"])
def test_texts_read_page_by_page_are_those_of_a_dense_pass(name: str) -> None:
    """On a budget that holds them; the batch's texts have several questions each."""
    lm = backbone(name, torch.float32, DEVICE)
    lm.config = lm.config.replace(kv_budget=1024)
    batch = tiny_batch(tiny_recipe(), num_further=3).to(DEVICE).pages
    found = streaming_states(lm, random_retriever(lm, 0).to(DEVICE), batch)
    wanted = dense_pass(lm.backbone, lm.attachment, batch)
    assert batch.sizes.text_end is not None
    for own, other in zip((*found.keys, *found.values), (*wanted.keys, *wanted.values), strict=True):
        end = batch.sizes.text_end
        assert (own[:, :end] - other[:, :end]).abs().max() < 1e-3 * other[:, :end].abs().max()


def test_a_run_and_its_speed(tmp_path: Path) -> None:
    options = {"dtype": "bfloat16", "num_workers": 2, "dev_every": 3}
    trainer = tiny_trainer(tmp_path / "run", backbone("qwen2", torch.bfloat16, DEVICE), **options)
    assert trainer.run()
    assert trainer.lm.model(torch.arange(2, 80, device=DEVICE)[None]).logits.isfinite().all()
    trainer = tiny_trainer(tmp_path / "speed", backbone("qwen2", torch.bfloat16, DEVICE), **options)
    found = training_speed(trainer, 3)
    assert found["training"]["peak_device_bytes"] > 0
    assert all(0 < part["host_s"] <= part["seconds"] for part in found["parts"].values())
