"""Our own layers over a whole text against the stock model's: losses, page sets and an adapter's gradients."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine import text_loss
from retrolm.engine.adapter import AdapterCard, new_adapter
from retrolm.engine.frozen_projections import FrozenProjections
from retrolm.engine.model import RetroLM
from retrolm.engine.text_layers import takes_text
from retrolm.engine.text_loss import checkpoint_layers, sparse_program, token_losses
from retrolm.ops.lora import adapted_linears
from test_against_naive import random_retriever
from tiny_models import random_ids, tiny_model

W = 8
PLAIN = ("llama", "llama-mqa", "mistral-sliding", "qwen2", "qwen2-sliding", "qwen3")


def attached(name: str, targets: str | None = "all", method: str = "retrolm", **options: Any) -> RetroLM:
    """A frozen float64 model with a random retriever and, unless `targets` is None, a random adapter of rank 3."""
    model = tiny_model(name).requires_grad_(False)
    lm = RetroLM(model, config=RetroConfig(kv_budget=5 * W, page_size=W, **options), method=method)
    if lm.method.needs_bookmarks:
        lm.use_retriever(random_retriever(lm, 0).double())
    if targets is not None:
        torch.manual_seed(1)
        adapter = new_adapter(lm.backbone, targets, 3, 6.0, AdapterCard({})).double()
        for value in adapter.parameters():
            value.data.copy_(torch.randn(value.shape) * 0.15)
        lm.use_adapter(adapter)
    return lm


def losses_and_gradients(
    lm: RetroLM, ids: Tensor, stock: bool, checkpointed: bool = False, num_prefix: int = 0, **options: Any
) -> tuple[Tensor, dict[str, Tensor], dict[int, Tensor]]:
    """Losses, the adapter's gradients and the page sets, by stock layers or our own."""
    assert lm.adapter is not None
    lm.adapter.zero_grad()
    bookmark = lm.untrained_bookmark() if lm.retriever is None else lm.retriever.embedding
    program = sparse_program(lm, lm.config, len(ids), num_prefix, **options)
    assert takes_text(lm.backbone, program)
    if checkpointed:
        checkpoint_layers(lm.model)
    way = mock.patch.object(text_loss, "takes_text", lambda *_: False) if stock else mock.patch.dict({})
    with way, lm.attachment.run(program):
        losses = token_losses(lm.backbone, ids, program, bookmark, num_prefix, chunk=13)
        losses.sum().backward()
    return losses.detach(), {k: p.grad for k, p in lm.adapter.named_parameters() if p.grad is not None}, program.chosen


def assert_same(found: Any, expected: Any) -> None:
    """As close as norms in float32 allow, which is what stock layers take them in."""
    assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-5)
    assert all(torch.equal(sets, expected[2][layer]) for layer, sets in found[2].items())
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert float((found[1][name] - value).norm()) <= 1e-4 * float(value.norm()), name


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("num_prefix", [0, 5])
@pytest.mark.parametrize("name", PLAIN)
def test_they_are_the_stock_layers(name: str, num_prefix: int, checkpointed: bool) -> None:
    lm, ids = attached(name), random_ids(99)
    expected = losses_and_gradients(lm, ids, True, num_prefix=num_prefix)
    assert all(float(gradient.norm()) > 0 for gradient in expected[1].values())
    assert_same(losses_and_gradients(lm, ids, False, checkpointed, num_prefix), expected)


@pytest.mark.parametrize("options", [
    {"targets": "attention"}, {"method": "random"}, {"method": "infllm_pages"}, {"causal_selection": True},
    {"first_layer_mode": "mean_key"}, {"bookmark_span": "page", "score_rope": True}, {"num_skip_layers": 0},
])  # fmt: skip
def test_with_other_options_too(options: dict[str, Any]) -> None:
    lm, ids = attached("qwen2", **options), random_ids(93)
    assert_same(losses_and_gradients(lm, ids, False, True), losses_and_gradients(lm, ids, True))


@pytest.mark.parametrize("options", [{"detach_pages": True}, {"dense_block": False}])
def test_with_detached_pages_and_without_the_dense_block(options: dict[str, Any]) -> None:
    lm, ids = attached("qwen2"), random_ids(93)
    expected = losses_and_gradients(lm, ids, True, num_prefix=3, **options)
    assert_same(losses_and_gradients(lm, ids, False, True, 3, **options), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_checkpointing_changes_nothing(name: str) -> None:
    """But for the CPU's attention, which has another way where no gradient is asked for."""
    lm, ids = attached(name), random_ids(99)
    plain, again = (losses_and_gradients(lm, ids, False, checkpointed) for checkpointed in (False, True))
    assert torch.allclose(plain[0], again[0], rtol=0, atol=1e-12)
    for key, value in plain[1].items():
        assert float((again[1][key] - value).norm()) <= 1e-10 * float(value.norm()), key


def test_pages_chosen_beforehand_are_taken() -> None:
    lm, ids = attached("qwen2"), random_ids(99)
    bookmark = lm.untrained_bookmark()
    found = []
    for method in ("random", "retrolm"):
        program = sparse_program(lm, lm.config, len(ids))
        if found:
            program.chosen.update(found[0][1])
        else:
            program = sparse_program(attached("qwen2", method=method), lm.config, len(ids))
            program.adapter, program.num_bookmarks = lm.adapter, 0
        with torch.no_grad(), lm.attachment.run(program):
            found.append((token_losses(lm.backbone, ids, program, bookmark), program.chosen))
    assert torch.equal(found[0][0], found[1][0])


def test_streaming_prefill_says_the_same() -> None:
    lm, ids = attached("qwen2"), random_ids(93)
    expected = torch.nn.functional.cross_entropy(lm.logits(ids)[:-1], ids[1:], reduction="none")
    assert torch.allclose(losses_and_gradients(lm, ids, False)[0], expected, rtol=0, atol=1e-5)


def test_who_keeps_to_stock_layers() -> None:
    """Models of other families or with weights to train, other people's hooks, and bookmarks' frozen projections."""

    def taken(lm: RetroLM, **options: Any) -> bool:
        return takes_text(lm.backbone, sparse_program(lm, lm.config, 90, **options))

    assert taken(attached("qwen2")) and taken(attached("qwen2", None))
    assert not taken(attached("gemma3")) and not taken(attached("llama-yarn"))
    lm = attached("qwen2")
    assert not taken(lm, frozen=FrozenProjections(lm.backbone))
    handle = lm.model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not taken(lm)
    handle.remove()
    lm.model.requires_grad_(True)
    assert not taken(lm)
    with torch.no_grad():
        assert taken(lm)
    second = RetroLM(lm.model, config=lm.config)
    assert not taken(second)  # the other's adapter acts on the model, too


@pytest.mark.parametrize("missing", [(), (1,), (0, 2)])
def test_linears_with_pairs(missing: tuple[int, ...]) -> None:
    """Outputs and gradients are those of the formula written out."""
    torch.manual_seed(0)
    rows = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weights, biases = [torch.randn(n, 6).double() for n in (5, 3, 4)], [torch.randn(5).double(), None, torch.ones(4)]
    biases[2] = biases[2].double()  # type: ignore[union-attr]
    ups = [
        None if n in missing else torch.randn(w.shape[0], 2).double().requires_grad_() for n, w in enumerate(weights)
    ]
    there = [up for up in ups if up is not None]
    down = torch.randn(2 * len(there), 6).double().requires_grad_()
    found = adapted_linears(rows, weights, biases, down, ups, 0.7)
    halves = iter(down.split(2))
    expected = []
    for weight, bias, up in zip(weights, biases, ups, strict=True):
        out = rows @ weight.T + (0 if bias is None else bias)
        expected.append(out if up is None else out + 0.7 * rows @ next(halves).T @ up.T)
    seeds = [torch.randn(out.shape).double() for out in expected]
    wanted = torch.autograd.grad(expected, [rows, down, *there], seeds)
    got = torch.autograd.grad(found, [rows, down, *there], seeds)
    for a, b in zip((*found, *got), (*expected, *wanted), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
