"""Stage 2 on CUDA: fused kernels against the CPU's float64, checkpointing in autograd's thread, exact repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.engine.text_loss import checkpoint_layers, sparse_program, token_losses
from stage2_run_maker import tiny_stage2_backbone, tiny_stage2_trainer, write_documents
from test_against_naive import random_retriever
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.gpu

W = 64
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


@pytest.mark.parametrize("changes", [{}, {"attention": "full"}, {"weights": "full", "lr": 1e-3}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopped_runs_go_on_with_the_same_bits(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "documents")

    def backbone() -> RetroLM:
        lm = tiny_stage2_backbone()
        half = dtype == "bfloat16" and "weights" not in changes
        model = lm.model.to("cuda", torch.bfloat16 if half else torch.float32)
        lm.detach()
        fresh = RetroLM(model, lm.tokenizer, config=lm.config)
        fresh.use_retriever(lm.retriever)  # type: ignore[arg-type]
        return fresh

    options = {"dtype": dtype, "deterministic": True, "num_steps": 4, "bits": 32, **changes}
    try:
        assert tiny_stage2_trainer(tmp_path / "whole", documents, backbone(), **options).run()
        while not tiny_stage2_trainer(tmp_path / "parts", documents, backbone(), **options).run(True, 1e-9):
            pass
    finally:
        torch.use_deterministic_algorithms(False)
    whole, parts = (sorted((tmp_path / name).rglob("*.safetensors")) for name in ("whole", "parts"))
    assert whole and all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, parts, strict=True))
