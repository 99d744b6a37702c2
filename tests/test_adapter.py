"""Adapters: what PEFT computes with them, bookmark rows untouched, other backbones and kinds refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine import encoder, prefill_layers
from retrolm.engine.adapter import CONFIG_FILE, TARGETS, AdapterCard, LoraAdapter, load_adapter, new_adapter
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.prefill_layers import can_fuse
from retrolm.engine.sparse_pass import SparseProgram
from retrolm.engine.text_loss import sparse_program, token_losses
from retrolm.errors import UserError
from test_against_naive import random_retriever
from tiny_models import random_ids, tiny_model

W = 8
FAMILIES = ("llama", "qwen2", "phi3", "gemma3")


def attached(model: Any, kv_budget: int = 5 * W) -> RetroLM:
    lm = RetroLM(model, config=RetroConfig(kv_budget=kv_budget, page_size=W))
    lm.use_retriever(random_retriever(lm, 0).double())
    return lm


def random_adapter(lm: RetroLM, targets: str = "all") -> LoraAdapter:
    """An adapter whose every part changes something."""
    torch.manual_seed(1)
    card = AdapterCard(lm.backbone.fingerprint(), "random", {"model": "tiny"})
    adapter = new_adapter(lm.backbone, targets, 3, 6.0, card)
    with torch.no_grad():
        for value in adapter.parameters():
            value.copy_(torch.randn(value.shape) * 0.15)
    return adapter.double()


def bookmark_states(lm: RetroLM, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Page scores' ingredients by layer, and the losses."""
    rows: list[Tensor] = []

    class Watching(SparseProgram):
        def choose(self, layer: int, q: Tensor, keys: Tensor, marks: tuple[Tensor, Tensor], *rest: Any) -> None:
            rows.append(torch.cat([x.flatten() for x in marks]))
            super().choose(layer, q, keys, marks, *rest)

    program = sparse_program(lm, lm.config, len(ids))
    program.__class__ = Watching
    with torch.no_grad(), lm.attachment.run(program):
        losses = token_losses(lm.backbone, ids, program, lm.retriever.embedding)  # type: ignore[union-attr]
    return rows, losses


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_reads_it_and_computes_the_same(name: str, tmp_path: Path) -> None:
    """With room for all pages; also the stock model itself, outside of RetroLM's passes, is the adapted one."""
    lm = attached(tiny_model(name), kv_budget=128)
    ids = random_ids(90)
    adapter = random_adapter(lm)
    adapter.save(tmp_path, bits=32)
    plain = lm.logits(ids)
    lm.use_adapter(tmp_path)
    found = lm.logits(ids)
    with torch.no_grad():
        own = lm.model(ids[None]).logits[0]
        wrapped = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path).double()
        expected = wrapped(ids[None]).logits[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert torch.allclose(own, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)
    lm.detach()
    with torch.no_grad():
        assert torch.equal(lm.model(ids[None]).logits, tiny_model(name)(ids[None]).logits)


@pytest.mark.parametrize("targets", list(TARGETS))
def test_bookmark_rows_go_past_it(targets: str) -> None:
    """In the first layer, before their pages' contents differ, bookmarks have the same bits with and without."""
    ids = random_ids(90)
    lm = attached(tiny_model("qwen2"))
    before, plain = bookmark_states(lm, ids)
    lm.use_adapter(random_adapter(lm, targets))
    after, adapted = bookmark_states(lm, ids)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(plain, adapted, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_wrapped_by_peft_is_the_same(name: str, tmp_path: Path) -> None:
    """Its bookmark rows go past the wrapped modules' adapters: logits under retrieval equal those of our own hooks."""
    ids = random_ids(90)
    lm = attached(tiny_model(name))
    random_adapter(lm).save(tmp_path, bits=32)
    lm.use_adapter(tmp_path)
    expected = lm.logits(ids)
    wrapped = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path).double()
    other = attached(wrapped.base_model.model)
    assert torch.allclose(other.logits(ids), expected, rtol=0, atol=1e-6)
    wrapped.merge_adapter()
    with pytest.raises(UserError, match="merged into the weights"):
        other.logits(ids)


@pytest.mark.parametrize("targets", list(TARGETS))
def test_layers_of_our_own_read_with_it_as_the_stock_ones(targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an MLP would take its rows some at a time, the last of which are bookmarks."""
    ids = random_ids(140)
    lm = attached(tiny_model("llama"))
    lm.use_adapter(random_adapter(lm, targets))
    monkeypatch.setattr(prefill_layers, "_MLP_INNER", 3 * lm.model.config.intermediate_size)
    assert can_fuse(lm.backbone)
    found = lm.logits(ids)
    monkeypatch.setattr(encoder, "can_fuse", lambda backbone: False)
    assert torch.allclose(found, lm.logits(ids), rtol=0, atol=1e-6)


def test_streaming_and_one_pass_agree_with_an_adapter() -> None:
    ids = random_ids(99)
    lm = attached(tiny_model("llama"))
    lm.use_adapter(random_adapter(lm))
    logits = lm.logits(ids)
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    assert torch.allclose(bookmark_states(lm, ids)[1], expected, rtol=0, atol=1e-5)


def test_adapters_of_peft_itself_are_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).double()
    wrapped.save_pretrained(tmp_path)
    ids = random_ids(50)
    with torch.no_grad():
        expected = wrapped(ids[None]).logits[0]
    lm = attached(tiny_model("llama"), kv_budget=64)
    lm.use_adapter(tmp_path)
    assert torch.allclose(lm.logits(ids), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="is in use already"):
        lm.use_adapter(tmp_path)


def test_other_backbones_are_refused(tmp_path: Path) -> None:
    random_adapter(attached(tiny_model("llama"))).save(tmp_path)
    with pytest.raises(UserError, match=r"another backbone \(norm_digest"):
        load_adapter(tmp_path, attached(tiny_model("llama", seed=1)).backbone)
    (tmp_path / "card.json").unlink()
    load_adapter(tmp_path, attached(tiny_model("llama", seed=1)).backbone)
    with pytest.raises(
        UserError, match=r"doesn't fit this model: model.layers.0.mlp.gate_proj is .48, 64. there and missing"
    ):
        load_adapter(tmp_path, attached(tiny_model("phi3")).backbone)
    with pytest.raises(UserError, match=r"k_proj is \(48, 24\) there and \(48, 48\) here"):
        load_adapter(tmp_path, attached(tiny_model("llama-mha")).backbone)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": "three"}, "names no rank"),
    ],
)
def test_other_kinds_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    lm = attached(tiny_model("llama"))
    random_adapter(lm).save(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=said):
        load_adapter(tmp_path, lm.backbone)


@pytest.mark.parametrize("bits", [8, 16])
def test_damaged_folders_are_refused(bits: int, tmp_path: Path) -> None:
    lm = attached(tiny_model("llama"))
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(tmp_path, lm.backbone)
    random_adapter(lm).save(tmp_path, bits)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="can't be read"):
        load_adapter(tmp_path, lm.backbone)
    path.unlink()
    with pytest.raises(UserError, match="holds no adapter weights"):
        load_adapter(tmp_path, lm.backbone)
    with pytest.raises(UserError, match="bits=4"):
        random_adapter(lm).save(tmp_path, 4)


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
@pytest.mark.parametrize("method", ["full", "retrolm", "tova"])
def test_the_engine_decodes_with_it(name: str, method: str) -> None:
    """One that comes when a step without it is ready already; and its weights may move."""
    lm = RetroLM(tiny_model(name), config=RetroConfig(kv_budget=5 * W, page_size=W), method=method)
    ids = random_ids(60, 0).tolist()

    def generated(decoding: str) -> tuple[int, ...]:
        options = {"max_new_tokens": 6, "do_sample": False, "decoding": decoding, "eos_token_id": []}
        return lm.answer([Prompt((), tuple(ids[:50]), tuple(ids[50:]))], **options)[0].token_ids

    bare, adapter = generated("fast"), random_adapter(lm)
    lm.use_adapter(adapter)
    for _ in range(2):
        assert generated("fast") == generated("plain") != bare
        for value in adapter.parameters():
            value.data = value.data * -2
