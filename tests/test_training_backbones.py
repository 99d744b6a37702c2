"""Training on a backbone of few bits per weight, or one that is kept elsewhere, is training on its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from stage1_run_maker import tiny_backbone, tiny_trainer
from stage2_run_maker import tiny_stage2_trainer, write_documents
from test_against_naive import random_retriever
from test_offload import IntegerLinear
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

PAGE = {"stage1": 32, "stage2": 16}


def in_eight_bits(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
    found = IntegerLinear(linear)
    return found, found.packed.float() * found.scale


def in_four_bits(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
    """By bitsandbytes, which on some CPUs computes without a gradient in evaluation mode."""
    kinds = pytest.importorskip("bitsandbytes.nn")
    from bitsandbytes.functional import dequantize_4bit

    rows = linear.weight.detach()
    found = kinds.Linear4bit(rows.shape[1], rows.shape[0], linear.bias is not None, torch.float32, quant_type="nf4")
    found.weight = kinds.Params4bit(rows.clone(), requires_grad=False, quant_type="nf4", module=found)
    found.bias = linear.bias
    found = found.to("cpu")
    return found, dequantize_4bit(found.weight.data, found.weight.quant_state)


def backbones(stage: str, quantise: Callable[[nn.Linear], tuple[nn.Module, Tensor]]) -> tuple[RetroLM, RetroLM]:
    """A quantised backbone, and one of the same numbers in float32."""
    found = []
    for keep in (False, True):
        model = tiny_model("qwen2", 0, torch.float32, vocab_size=600, max_position_embeddings=1024, num_hidden_layers=3)
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, linear in list(block.named_children()):
                    if isinstance(linear, nn.Linear):
                        module, value = quantise(linear)
                        linear.weight.data.copy_(value)
                        setattr(block, name, linear if keep else module)
        model.is_quantized = not keep
        model.eval()
        config = RetroConfig(kv_budget=5 * PAGE[stage], page_size=PAGE[stage])
        lm = RetroLM(model, tiny_tokenizer(), config=config)
        if stage == "stage2":
            lm.use_retriever(random_retriever(lm, 0).float())
        found.append(lm)
    return found[0], found[1]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("quantise", [in_eight_bits, in_four_bits])
def test_a_quantised_backbone_trains_as_its_numbers_do(
    quantise: Callable[[nn.Linear], tuple[nn.Module, Tensor]], stage: str, documents: Path, tmp_path: Path
) -> None:
    trainers: list[Any] = []
    for number, lm in enumerate(backbones(stage, quantise)):
        out, options = tmp_path / str(number), {"lr": 1e-4, "num_steps": 3}
        if stage == "stage1":
            trainers.append(tiny_trainer(out, lm, **options))
        else:
            trainers.append(tiny_stage2_trainer(out, documents, lm, checkpointing=False, **options))
        assert trainers[-1].run()
    alike(*trainers)


def test_a_backbone_kept_in_host_memory_trains_alike(tmp_path: Path) -> None:
    plain, other = tiny_backbone(), tiny_backbone()
    other.detach()
    model = cpu_offload(other.model, torch.device("cpu"), offload_buffers=True)
    offloaded = RetroLM(model, other.tokenizer, config=other.config)
    assert next(model.parameters()).is_meta
    trainers = [tiny_trainer(tmp_path / str(n), lm, lr=1e-4, num_steps=3) for n, lm in enumerate((plain, offloaded))]
    assert all(trainer.run() for trainer in trainers)
    alike(*trainers)


def alike(one: Any, two: Any) -> None:
    other = two.trained.state_dict()
    for name, value in one.trained.state_dict().items():
        assert torch.allclose(value, other[name], rtol=0, atol=5e-6), name
