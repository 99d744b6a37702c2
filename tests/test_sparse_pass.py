"""F9: the one-pass block-sparse form against the stock model, a dense masked reference, and streaming prefill."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grids import pairs
from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.engine.sparse_pass import SparseProgram
from retrolm.engine.text_loss import checkpoint_layers, sparse_program, token_losses
from retrolm.errors import UserError
from retrolm.ops.cross_entropy import chunked_cross_entropy
from retrolm.ops.page_gather import gather_pages
from sparse_reference import reference_losses
from test_against_naive import random_retriever
from tiny_models import exact_model, random_ids, tiny_model, wide_softmax

W = 8
NAMES = ("llama", "llama-mqa", "llama-yarn", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "mistral-sliding")
Gradients = dict[str, Tensor]


def gradients(model: Any, loss: Tensor) -> Gradients:
    """Gradient of every weight."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is not None}


def assert_close(found: Gradients, expected: Gradients, relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= relative * float(value.norm()) + 1e-12, name


def run(
    model: Any,
    ids: Tensor,
    num_prefix: int = 0,
    method: str = "retrolm",
    trained: bool = False,
    chunk: int = 13,
    **options: Any,
) -> tuple[Tensor, Gradients, SparseProgram]:
    """Losses of a text, the gradients of their mean, and the program that gave them."""
    own = {key: options.pop(key) for key in ("dense_block", "detach_pages") if key in options}
    checkpointed = options.pop("checkpointed", False)
    lm = RetroLM(model, config=RetroConfig(page_size=W, **options), method=method)
    if trained:
        lm.use_retriever(random_retriever(lm, 0).double())
    bookmark = lm.untrained_bookmark() if lm.retriever is None else lm.retriever.embedding
    program = sparse_program(lm, lm.config, len(ids), num_prefix, **own)
    if checkpointed:
        checkpoint_layers(model)
    with lm.attachment.run(program):
        losses = token_losses(lm.backbone, ids, program, bookmark, chunk=chunk)
        if checkpointed:
            model.zero_grad()
            losses.mean().backward()
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        else:
            found = gradients(model, losses.mean())
    lm.detach()
    return losses.detach(), found, program


@pytest.mark.parametrize(("name", "dense_block", "num_prefix"), pairs(NAMES, [True, False], [0, 5]))
def test_with_room_for_all_pages_it_is_the_stock_model(name: str, dense_block: bool, num_prefix: int) -> None:
    """Loss and every gradient; also with the dense block off, where every page goes through its gathered set."""
    model, ids = tiny_model(name), random_ids(77)
    with wide_softmax():
        stock = model(ids[None]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(stock, ids[1:])
        expected_gradients = gradients(model, expected)
        expected = expected.detach()
    losses, found, _ = run(model, ids, num_prefix, trained=True, kv_budget=200, dense_block=dense_block)
    assert float(losses.mean()) == pytest.approx(float(expected), rel=1e-5)
    assert_close(found, expected_gradients)


@pytest.mark.parametrize("num_prefix", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_random_sets_equal_the_dense_masked_reference(name: str, num_prefix: int) -> None:
    """T is no whole number of pages, pages are chosen at random, one page is read by many and some by none."""
    model, ids = exact_model(name), random_ids(99)
    losses, found, program = run(model, ids, num_prefix, "random", kv_budget=5 * W)
    sets = program.chosen
    if name not in ("gemma2", "gemma3"):
        assert any(set(sets[1][m].tolist()) != set(sets[2][m].tolist()) for m in range(len(sets[1])))
    expected = reference_losses(model, ids, list(program.pages.lengths), sets)
    assert torch.allclose(losses, expected, rtol=1e-9, atol=1e-9)
    assert_close(found, gradients(model, expected.mean()), 1e-6)


@pytest.mark.parametrize("options", [
    {}, {"causal_selection": True}, {"strict_budget": False}, {"first_layer_mode": "mean_key", "num_local_pages": 2},
    {"first_layer_mode": "full"}, {"bookmark_span": "page", "score_rope": True}, {"num_skip_layers": 0},
])  # fmt: skip
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "mistral-sliding"])
def test_it_chooses_and_says_what_streaming_prefill_does(name: str, options: dict[str, Any]) -> None:
    model, ids = tiny_model(name), random_ids(93)
    lm = RetroLM(model, config=RetroConfig(page_size=W, kv_budget=5 * W, chunk_pages=4, **options))
    lm.use_retriever(random_retriever(lm, 0).double())
    logits = lm.logits(ids)
    lm.detach()
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    losses, _, _ = run(model, ids, trained=True, kv_budget=5 * W, **options)
    assert torch.allclose(losses, expected, rtol=0, atol=1e-5)


def test_a_prefix_page_is_read_as_in_documents() -> None:
    """The short sink page stands where `read` puts it: the same sets in every layer."""
    model, text = tiny_model("llama"), random_ids(78)
    lm = RetroLM(model, config=RetroConfig(page_size=W, kv_budget=5 * W, agreement_layers=0))
    prefix = random_ids(5, 3)
    _, _, program = run(model, torch.cat([prefix, text]), 5, kv_budget=5 * W)
    lm.split_head = lambda *_: (prefix.tolist(), [])  # type: ignore[method-assign]
    document = lm.read(text[:-6])
    found = lm.retrieve(document, text[-6:].tolist())
    for layer in range(4):
        row = program.chosen[layer][-1]
        assert row[row >= 0].tolist() == [page for page in found.page_ids[layer].tolist() if page >= 0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_checkpointing_and_chunking_change_no_bit(name: str) -> None:
    plain = run(tiny_model(name), random_ids(99), trained=True, kv_budget=5 * W, chunk=1000)
    again = run(tiny_model(name), random_ids(99), trained=True, kv_budget=5 * W, chunk=1000, checkpointed=True)
    assert torch.equal(plain[0], again[0]) and all(torch.equal(plain[1][key], again[1][key]) for key in plain[1])
    chunked = run(tiny_model(name), random_ids(99), trained=True, kv_budget=5 * W, chunk=7)
    assert torch.allclose(plain[0], chunked[0], rtol=0, atol=1e-12)
    assert_close(chunked[1], plain[1], 1e-12)


def test_layers_may_run_again_in_another_thread() -> None:
    """As on CUDA, where autograd has a thread of its own: the second run belongs to the pass of the first."""
    ids = random_ids(99)
    _, expected, _ = run(tiny_model("qwen2"), ids, kv_budget=5 * W)
    model = tiny_model("qwen2")
    lm = RetroLM(model, config=RetroConfig(page_size=W, kv_budget=5 * W))
    program = sparse_program(lm, lm.config, len(ids))
    checkpoint_layers(model)
    with lm.attachment.run(program):
        loss = token_losses(lm.backbone, ids, program, lm.untrained_bookmark(), chunk=13).mean()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(20, 70), st.integers(0, 3))
def test_causal_selection_sees_no_later_token(cut: int, seed: int) -> None:
    """Changing what comes after changes no earlier loss; without the option it does (D22)."""
    ids = random_ids(80, seed)
    other = torch.cat([ids[:cut], random_ids(80 - cut, seed + 100)])
    first, second = (
        run(tiny_model("llama", seed), text, kv_budget=5 * W, trained=True, causal_selection=True)[0]
        for text in (ids, other)
    )
    assert torch.allclose(first[: cut - 1], second[: cut - 1], rtol=0, atol=1e-12)


def test_plain_selection_sees_later_tokens_of_its_page() -> None:
    ids = random_ids(80)
    seen = []
    for last in range(2, 40):
        text = ids.clone()
        text[-1] = last
        seen.append(run(tiny_model("llama"), text, kv_budget=5 * W, trained=True)[0][:-1])
    assert any(not torch.equal(seen[0], other) for other in seen)


def test_detached_pages_change_gradients_and_nothing_else() -> None:
    ids = random_ids(99)
    whole = run(tiny_model("llama"), ids, kv_budget=4 * W)
    detached = run(tiny_model("llama"), ids, kv_budget=4 * W, detach_pages=True)
    assert torch.equal(whole[0], detached[0])
    key = "model.layers.3.self_attn.k_proj.weight"
    assert not torch.allclose(whole[1][key], detached[1][key])
    head = "lm_head.weight"
    assert torch.equal(whole[1][head], detached[1][head])


def test_bookmarks_get_no_gradient() -> None:
    """Nor do the retriever's weights: selection is a choice (D20)."""
    lm = RetroLM(tiny_model("qwen2"), config=RetroConfig(page_size=W, kv_budget=4 * W))
    lm.use_retriever(random_retriever(lm, 0).double())
    assert lm.retriever is not None
    program = sparse_program(lm, lm.config, 90)
    with lm.attachment.run(program):
        loss = token_losses(lm.backbone, random_ids(90), program, lm.retriever.embedding).sum()
        found = torch.autograd.grad(loss, list(lm.retriever.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in found)


def test_a_prefix_longer_than_a_page_is_refused() -> None:
    lm = RetroLM(tiny_model("llama"), config=RetroConfig(page_size=W, kv_budget=4 * W))
    with pytest.raises(UserError, match="prefix takes 9 tokens"):
        sparse_program(lm, lm.config, 90, 9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_gathering_pages(num_pages: int, n: int, slots: int, last_only: bool, seed: int) -> None:
    """Values and gradients are those of plain indexing and turning, whoever reads a page how often."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.randn(num_pages, 3, 2, 6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)
    )
    picked = torch.randint(num_pages, (n, slots), generator=generator)
    span = slice(1, slots * 3 - 1)
    angles = torch.randn(1, slots * 3 - 2, 1, 2, dtype=torch.float64, generator=generator).repeat(1, 1, 1, 2)
    weights = torch.randn(2, n, slots * 3 - 2, 2, 6, dtype=torch.float64, generator=generator)
    found = gather_pages(keys, values, picked, angles.cos(), angles.sin(), span, last_only)
    read_k, read_v = (
        torch.cat([x.detach()[picked[:, :-1]] if last_only else x[picked[:, :-1]], x[picked[:, -1:]]], 1)
        for x in (keys, values)
    )
    read_k, read_v = (x.flatten(1, 2)[:, span] for x in (read_k, read_v))
    first, second = read_k[..., :2], read_k[..., 2:4]
    cos, sin = angles.cos()[..., :2], angles.sin()[..., :2]
    read_k = torch.cat([first * cos - second * sin, second * cos + first * sin, read_k[..., 4:]], -1)
    grads = []
    for parts in (found, (read_k, read_v)):
        total = (parts[0] * weights[0]).sum() + (parts[1] * weights[1]).sum()
        grads.append(torch.autograd.grad(total, (keys, values)))
    assert torch.allclose(found[0], read_k, rtol=0, atol=1e-12) and torch.equal(found[1], read_v)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, 63, 64])
def test_chunked_cross_entropy(chunk: int, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(63, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(111, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(111, (63,))
    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    found = chunked_cross_entropy(hidden, weight, labels, chunk, softcap)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected.sum() * 0.3, (hidden, weight))
    got = torch.autograd.grad(found.sum() * 0.3, (hidden, weight))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(got, wanted, strict=True))
    with pytest.raises(ValueError, match="the same gradient for every token"):
        chunked_cross_entropy(hidden, weight, labels, chunk, softcap)[:5].sum().backward()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_cross_entropy_in_half_precision(softcap: float | None) -> None:
    """Sure of most labels, whose share leaves little: a gradient of that little, not of what rounding leaves of it."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(63, 12), torch.randn(111, 12), torch.randint(111, (63,))
    hidden = (hidden + 2 * weight[labels]).bfloat16().requires_grad_()
    weight = weight.bfloat16()
    found = chunked_cross_entropy(hidden, weight, labels, 16, softcap)
    logits = (hidden @ weight.T).detach().float().requires_grad_()  # rounded as they are
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = torch.nn.functional.cross_entropy(capped, labels, reduction="none")
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(expected.sum(), logits)
    (got,) = torch.autograd.grad(found.sum(), hidden)
    wanted = wanted @ weight.float()
    assert float((got.float() - wanted).norm()) < 0.01 * float(wanted.norm())
