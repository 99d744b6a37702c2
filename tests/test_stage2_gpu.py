"""Stage 2 on CUDA: fused kernels against the CPU's float64, checkpointing in autograd's thread, exact repeats."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.adapter import AdapterCard
from retrolm.engine.model import RetroLM
from retrolm.engine.text_layers import takes_text
from retrolm.engine.text_loss import checkpoint_layers, sparse_program, token_losses
from retrolm.training.stage2.config import Stage2TrainConfig
from retrolm.training.stage2.speed import measure_speed
from retrolm.training.stage2.step import Stage2Step
from stage2_run_maker import tiny_stage2_backbone, tiny_stage2_trainer, write_documents
from test_against_naive import random_retriever
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.gpu

W = 64
TRAIN = Stage2TrainConfig(model="tiny", kv_budget=8 * W, page_size=W, loss_chunk=500, train_retriever=True)
SHAPE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 4096}


def losses_and_gradients(
    device: str, dtype: torch.dtype, checkpointed: bool, name: str = "qwen2", chosen: dict[int, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor], dict[int, Tensor]]:
    """Losses of 1,900 tokens at a budget of 8 pages, gradients of their mean, and the sets (given ones are used)."""
    model = tiny_model(name, dtype=dtype, **SHAPE).to(device)
    lm = RetroLM(model, config=RetroConfig(kv_budget=8 * W, page_size=W))
    lm.use_retriever(random_retriever(lm, 0).to(device))
    program = sparse_program(lm, lm.config, 1900)
    program.chosen.update({layer: sets.to(device) for layer, sets in (chosen or {}).items()})
    if checkpointed:
        checkpoint_layers(model)
    with lm.attachment.run(program):
        losses = token_losses(lm.backbone, random_ids(1900), program, lm.retriever.embedding)  # type: ignore[union-attr]
        losses.mean().backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return losses.detach().double().cpu(), gradients, {layer: sets.cpu() for layer, sets in program.chosen.items()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "llama", "mistral-sliding"])
def test_float64_is_that_of_the_cpu(name: str, checkpointed: bool) -> None:
    expected = losses_and_gradients("cpu", torch.float64, False, name)
    found = losses_and_gradients("cuda", torch.float64, checkpointed, name)
    assert all(torch.equal(sets, expected[2][layer]) for layer, sets in found[2].items())
    assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-5)
    for key, value in expected[1].items():
        assert float((found[1][key] - value).norm() / value.norm().clamp(min=1e-9)) < 1e-4, key


@pytest.mark.parametrize("checkpointed", [False, True])
def test_bfloat16_with_fused_kernels_is_close(checkpointed: bool) -> None:
    """Under the sets that float64 chose."""
    expected = losses_and_gradients("cpu", torch.float64, False)
    found = losses_and_gradients("cuda", torch.bfloat16, checkpointed, chosen=expected[2])
    assert float((found[0] - expected[0]).abs().mean()) < 0.15
    for key, value in expected[1].items():
        cosine = torch.nn.functional.cosine_similarity(found[1][key].flatten(), value.flatten(), dim=0)
        assert float(cosine) > 0.9 or float(value.norm()) < 1e-4, (key, float(cosine))


def adapted(device: str, dtype: torch.dtype, name: str = "qwen2") -> Stage2Step:
    """A frozen model with a random retriever and an adapter whose every part changes something."""
    lm = RetroLM(tiny_model(name, dtype=dtype, **SHAPE).to(device), config=RetroConfig(kv_budget=8 * W, page_size=W))
    lm.use_retriever(random_retriever(lm, 0).to(device))
    step = Stage2Step(lm, TRAIN, 0, AdapterCard({})).to(device)
    torch.manual_seed(3)
    for value in step.parameters():
        value.data.copy_(torch.randn(value.shape) * 0.02)
    checkpoint_layers(lm.model)
    return step.double() if dtype == torch.float64 else step


def step_gradients(
    step: Stage2Step, chosen: dict[int, Tensor] | None = None
) -> tuple[float, Tensor, dict[int, Tensor], Tensor]:
    """Loss of 1,900 tokens, the adapter's gradients side by side, the sets, and the retriever's gradients."""
    program = step.program(1900)
    assert program is not None and takes_text(step.lm.backbone, program)
    program.chosen.update({layer: sets.to(step.lm.device) for layer, sets in (chosen or {}).items()})
    with step.running(program):
        loss = step(random_ids(1900), program)
        loss.backward()
    step.after_backward(program)
    assert step.apart is not None
    adapter, retriever = (
        torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double().cpu()
        for module in (step, step.apart)
    )
    return float(loss) / 1899, adapter, {layer: sets.cpu() for layer, sets in program.chosen.items()}, retriever


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])
def test_our_own_layers_in_float64_are_those_of_the_cpu(name: str) -> None:
    expected, found = (step_gradients(adapted(device, torch.float64, name)) for device in ("cpu", "cuda"))
    assert all(torch.equal(sets, expected[2][layer]) for layer, sets in found[2].items())
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    for part in (1, 3):
        assert float((found[part] - expected[part]).norm() / expected[part].norm()) < 1e-4


def test_our_own_layers_in_bfloat16_are_close() -> None:
    """Under the sets that float64 chose."""
    expected = step_gradients(adapted("cpu", torch.float64))
    found = step_gradients(adapted("cuda", torch.bfloat16), expected[2])
    assert found[0] == pytest.approx(expected[0], abs=0.15)
    for part in (1, 3):
        assert float(torch.cosine_similarity(found[part], expected[part], dim=0)) > 0.9


@pytest.mark.parametrize("prefix", ["", "chat"])
@pytest.mark.parametrize(
    "changes", [{}, {"causal_selection": True}, {"checkpointing": False}, {"train_retriever": True}]
)
def test_a_step_never_waits_for_the_device(changes: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    """PyTorch itself raises on anything that would."""
    documents = write_documents(tmp_path / "documents")
    trainer = tiny_stage2_trainer(tmp_path / "run", documents, on_gpu("bfloat16"), {"prefix": prefix}, **{
        "dtype": "bfloat16", **changes
    })  # fmt: skip
    pieces = list(islice(trainer.batches(), 6))
    trainer.update(pieces[:2])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for first in (2, 4):
            trainer.update(pieces[first : first + 2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_speed_of_its_parts() -> None:
    step = adapted("cuda", torch.bfloat16)
    found = measure_speed(step, TRAIN, [700], 1)
    (row,) = found["rows"]
    assert found["equal"] and row["sparse"]["peak_device_bytes"] > 0
    assert all(0 < part["host_s"] <= part["seconds"] for part in row["sparse"]["parts"].values())


def on_gpu(dtype: str) -> RetroLM:
    """The tiny backbone and its retriever, moved."""
    lm = tiny_stage2_backbone()
    model = lm.model.to("cuda", getattr(torch, dtype))
    lm.detach()
    fresh = RetroLM(model, lm.tokenizer, config=lm.config)
    fresh.use_retriever(lm.retriever)  # type: ignore[arg-type]
    return fresh


@pytest.mark.parametrize(
    "changes", [{}, {"attention": "full"}, {"weights": "full", "lr": 1e-3}, {"train_retriever": True}]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopped_runs_go_on_with_the_same_bits(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "documents")
    weights = "bfloat16" if dtype == "bfloat16" and "weights" not in changes else "float32"
    options = {"dtype": dtype, "deterministic": True, "num_steps": 4, "bits": 32, **changes}
    try:
        assert tiny_stage2_trainer(tmp_path / "whole", documents, on_gpu(weights), **options).run()
        while not tiny_stage2_trainer(tmp_path / "parts", documents, on_gpu(weights), **options).run(True, 1e-9):
            pass
    finally:
        torch.use_deterministic_algorithms(False)
    whole, parts = (sorted((tmp_path / name).rglob("*.safetensors")) for name in ("whole", "parts"))
    assert whole and all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, parts, strict=True))
