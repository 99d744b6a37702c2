"""Models whose weights accelerate keeps elsewhere between passes, and weights of other kinds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from retrolm.config import RetroConfig
from retrolm.engine.decode_step import fused_obstacle
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from test_against_naive import random_retriever
from tiny_folder import save_tiny_model
from tiny_models import random_ids, stock_logits, tiny_model

IDS = random_ids(80)


def attach(model: Any) -> RetroLM:
    lm = RetroLM(model, config=RetroConfig(kv_budget=48, page_size=8))
    lm.use_retriever(random_retriever(lm, 2))
    return lm


def offloaded(model: Any, where: str, folder: Path) -> Any:
    model = copy.deepcopy(model)
    device = torch.device("cpu")
    return disk_offload(model, folder, device) if where == "disk" else cpu_offload(model, device, offload_buffers=True)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3-longrope"])
def test_offloaded_models_read_alike(name: str, where: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    plain, other = attach(model), attach(offloaded(model, where, tmp_path))
    assert next(other.model.parameters()).is_meta and other.device.type == "cpu"
    assert other.backbone.fingerprint() == plain.backbone.fingerprint()
    assert (other.logits(IDS) - plain.logits(IDS)).abs().max() <= 1e-6
    out = [lm.generate(IDS[None], max_new_tokens=6, do_sample=False) for lm in (plain, other)]
    assert torch.equal(*out)


def test_device_map_of_from_pretrained(tmp_path: Path) -> None:
    """Two of three layers on disk, as on a machine that is too small for the model."""
    folder = save_tiny_model(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    options: dict[str, Any] = {"kv_budget": 96, "page_size": 8, "dtype": "float32"}
    plain = RetroLM.from_pretrained(folder, **options)
    other = RetroLM.from_pretrained(
        folder, device_map=device_map, model_options={"offload_folder": str(tmp_path / "offload")}, **options
    )
    assert {str(p.device) for p in other.model.parameters()} == {"cpu", "meta"}
    assert (other.logits(IDS) - plain.logits(IDS)).abs().max() <= 1e-5


class IntegerLinear(nn.Module):
    """A linear layer as quantisers make them: not an `nn.Linear`, no floating-point weight, no parameters at all."""

    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.packed.to(rows.dtype) * self.scale, self.bias)


def quantised(name: str, dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_model(name, dtype=dtype)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for part, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block, part, IntegerLinear(linear))
    return model


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma2"])
def test_quantised_linears_read_alike(name: str) -> None:
    """What counts is that projections are called, not what they hold."""
    model = quantised(name)
    lm = RetroLM(model, config=RetroConfig(kv_budget=96, page_size=8))
    assert (lm.logits(IDS) - stock_logits(model, IDS)).abs().max() <= 1e-6
    lm.use_retriever(random_retriever(lm, 2))
    assert (lm.logits(IDS) - stock_logits(model, IDS)).abs().max() <= 1e-6


def test_keys_of_quantised_bookmarks_are_projected_without_their_bias() -> None:
    """Subtracted from a sum in low precision, a bias like Qwen2's leaves nothing of what tells pages apart."""
    model = quantised("qwen2", torch.bfloat16)
    module = model.model.layers[1].self_attn.k_proj
    module.bias.data += 200.0
    lm, rows = attach(model), torch.randn(1, 5, 48, dtype=torch.bfloat16)
    content = lm.backbone.content_keys(1, rows, module(rows))
    exact = rows.double() @ (module.packed.double() * module.scale.double()).T
    assert content is not None and (content.double() - exact).abs().max() <= 0.05
    assert (module(rows) - module.bias - content).abs().max() >= 0.25 and module.bias.min() > 190


class OtherWeight(torch.Tensor):
    """A weight of a type of its own, as torchao's are."""


def test_fused_layers_want_plain_weights() -> None:
    model = tiny_model("llama")
    assert fused_obstacle(attach(model).backbone) is None
    linear = model.model.layers[2].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(OtherWeight))
    assert fused_obstacle(attach(model).backbone) == "no fused layers for OtherWeight modules"


def test_a_missing_quantiser_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install bitsandbytes`")

    folder = save_tiny_model(tmp_path / "model")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(UserError, match=r"Can't load the model .* requires bitsandbytes: `pip install bitsandbytes`$"):
        RetroLM.from_pretrained(folder)
