"""Joint training (D20 b): the retriever's gradients against a dense masked reference; all else stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grids import some
from pull_reference import joint_losses
from retrolm.config import RetroConfig
from retrolm.engine.adapter import AdapterCard, new_adapter
from retrolm.engine.frozen_projections import FrozenProjections
from retrolm.engine.model import RetroLM
from retrolm.engine.page_pulls import retriever_gradients
from retrolm.engine.sparse_pass import SparseProgram
from retrolm.engine.text_layers import takes_text
from retrolm.engine.text_loss import checkpoint_layers, keep_layers, sparse_program, token_losses
from retrolm.ops.attention import attend_reference
from retrolm.ops.page_pull import with_pull
from test_against_naive import random_retriever
from tiny_models import exact_model, random_ids, tiny_model

W = 8
NAMES = ("llama", "llama-mqa", "llama-yarn", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "mistral-sliding")


def attached(model: Any, adapted: bool, **options: Any) -> RetroLM:
    """With a random retriever of full rank, and an adapter at work on frozen weights if `adapted`."""
    lm = RetroLM(model, config=RetroConfig(kv_budget=5 * W, page_size=W, **options))
    lm.use_retriever(random_retriever(lm, 0).double())
    if adapted:
        model.requires_grad_(False)
        adapter = new_adapter(lm.backbone, "all", 3, 6.0, AdapterCard({})).double()
        for value in adapter.parameters():
            value.data.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
        lm.use_adapter(adapter)
    return lm


def backward(
    lm: RetroLM, ids: Tensor, num_prefix: int = 0, checkpointed: bool = False, **options: Any
) -> tuple[Tensor, list[Tensor | None], SparseProgram]:
    """Losses, the gradients of whatever is trained besides the retriever, and the program."""
    trained = list(lm.model.parameters() if lm.adapter is None else lm.adapter.parameters())
    for value in trained:
        value.grad = None
    sets = options.pop("sets", {})
    assert lm.retriever is not None
    program = sparse_program(lm, lm.config, len(ids), num_prefix, **options)
    program.chosen.update(sets)
    if checkpointed:
        checkpoint_layers(lm.model)
    with lm.attachment.run(program):
        losses = token_losses(lm.backbone, ids, program, lm.retriever.embedding, chunk=13)
        losses.sum().backward()
    keep_layers(lm.model)
    return losses.detach(), [value.grad for value in trained], program


def random_sets(model: Any, ids: Tensor, num_prefix: int) -> dict[int, Tensor]:
    """Sets that no bookmark chose."""
    lm = RetroLM(model, config=RetroConfig(kv_budget=5 * W, page_size=W), method="random")
    program = sparse_program(lm, lm.config, len(ids), num_prefix)
    with torch.no_grad(), lm.attachment.run(program):
        token_losses(lm.backbone, ids, program, lm.untrained_bookmark())
    lm.detach()
    return program.chosen


def check_against_reference(lm: RetroLM, ids: Tensor, num_prefix: int, program: SparseProgram, losses: Tensor) -> None:
    assert lm.retriever is not None and program.pulls is not None
    found = retriever_gradients(lm, program)
    deltas = {
        (shape.layer, shape.name): lm.retriever.deltas[shape.key].weight for shape in lm.backbone.projection_shapes()
    }
    expected = joint_losses(
        lm.model, ids, list(program.pages.lengths), num_prefix, program.chosen, sorted(program.pulls.by_layer),
        lm.retriever.embedding, deltas, lm.config.causal_selection,
    )  # fmt: skip
    assert torch.allclose(losses, expected, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(expected.sum(), list(lm.retriever.parameters()), allow_unused=True)
    assert sum(w is not None and float(w.norm()) > 0 for w in wanted) > len(wanted) / 2
    for (name, value), got, want in zip(lm.retriever.named_parameters(), found, wanted, strict=True):
        want = torch.zeros_like(value) if want is None else want
        assert float((got - want).norm()) <= 1e-5 * float(want.norm()) + 1e-12, name  # norms run in float32


@pytest.mark.parametrize(("name", "num_prefix"), some(NAMES, [0, 5], each=1))
def test_random_sets_equal_the_dense_reference(name: str, num_prefix: int) -> None:
    """T is no whole number of pages; a page is read by many and some by none."""
    model, ids = exact_model(name), random_ids(99)
    sets = random_sets(model, ids, num_prefix)
    lm = attached(model, False)
    losses, _, program = backward(lm, ids, num_prefix, train_retriever=True, sets=sets)
    check_against_reference(lm, ids, num_prefix, program, losses)


@pytest.mark.parametrize("options", [
    {"causal_selection": True}, {"strict_budget": False}, {"first_layer_mode": "full"}, {"num_skip_layers": 2},
], ids=str)  # fmt: skip
def test_chosen_sets_equal_the_dense_reference(options: dict[str, Any]) -> None:
    lm, ids = attached(exact_model("qwen2"), False, **options), random_ids(93)
    losses, _, program = backward(lm, ids, 3, train_retriever=True)
    assert program.pulls is not None and min(program.pulls.by_layer) == lm.config.num_skip_layers
    check_against_reference(lm, ids, 3, program, losses)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_nothing_else_changes_by_a_bit(name: str, adapted: bool, checkpointed: bool) -> None:
    """Losses, sets and all other gradients are those with the retriever kept as it is; the pulls are the same however
    the layers run (our own take plain models under an adapter)."""
    ids = random_ids(99)
    lm = attached(tiny_model(name), adapted)
    kept = backward(lm, ids, 5, checkpointed)
    assert kept[2].pulls is None and takes_text(lm.backbone, kept[2]) == (adapted and name == "qwen2")
    joint = backward(lm, ids, 5, checkpointed, train_retriever=True)
    assert torch.equal(kept[0], joint[0])
    assert all(torch.equal(kept[2].chosen[n], joint[2].chosen[n]) for n in range(4))
    for one, other in zip(kept[1], joint[1], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)  # type: ignore[arg-type]
    undivided = backward(lm, ids, 5, train_retriever=True, dense_block=False)
    for got, want in zip(retriever_gradients(lm, joint[2]), retriever_gradients(lm, undivided[2]), strict=True):
        assert float((got - want).norm()) <= 1e-4 * float(want.norm())
    assert all(value.grad is None for value in lm.retriever.parameters())  # type: ignore[union-attr]


def test_with_room_for_all_pages_there_is_nothing_to_learn() -> None:
    lm = attached(tiny_model("llama"), True)
    _, _, program = backward(lm, random_ids(40), train_retriever=True)
    assert all(not gradient.any() for gradient in retriever_gradients(lm, program))


def test_bookmarks_keep_to_the_old_projections_while_the_model_moves() -> None:
    """All weights are trained: W^b stays where it was, so the gradients are those before the model's q, k, v moved."""
    model, ids = tiny_model("qwen2"), random_ids(99)
    lm = attached(model, False)
    frozen = FrozenProjections(lm.backbone)
    _, _, program = backward(lm, ids, train_retriever=True, frozen=frozen)
    expected = retriever_gradients(lm, program)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.5)
            layer.self_attn.k_proj.weight.mul_(2.0)
    found = retriever_gradients(lm, program)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradient_of_a_score_in_the_logits(
    heads: tuple[int, int], softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes, a page at a time; the first slot's first tokens aren't gathered."""
    monkeypatch.setattr("retrolm.ops.page_pull._MOST_WEIGHTS", 1)
    generator = torch.Generator().manual_seed(0)
    n, Q, S, first, (H, K), D = 3, 5, 4, 2, heads, 6
    L = S * Q - first - 1  # the last page is one token short
    q = torch.randn(n, Q - 1, H, D, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(n, L, K, D, dtype=torch.float64, generator=generator) for _ in range(2))
    weights = torch.randn(q.shape, dtype=torch.float64, generator=generator)
    allowed = torch.ones(1, Q - 1, L, dtype=torch.bool).tril(L - Q + 1)
    scores = torch.zeros(n, S, dtype=torch.float64, requires_grad=True)
    slot = (torch.arange(L) + first) // Q
    groups = k.repeat_interleave(H // K, 2), v.repeat_interleave(H // K, 2)
    logits = torch.einsum("nqhd,nthd->nhqt", q, groups[0]) * 0.4
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits = (logits + scores[:, None, None, slot]).masked_fill(~allowed[:, None], -torch.inf)
    out = torch.einsum("nhqt,nthd->nqhd", logits.softmax(-1), groups[1])
    (expected,) = torch.autograd.grad((out * weights).sum(), scores)
    noted: list[Tensor] = []
    plain = attend_reference(q, k, v, allowed, 0.4, softcap).requires_grad_()
    found = with_pull(plain, (q, k, v), None, 0.4, softcap, (S, Q, first), noted.append)
    assert torch.equal(found, plain) and torch.allclose(found, out, rtol=0, atol=1e-12)
    (found * weights).sum().backward()
    assert torch.allclose(noted[0], expected, rtol=0, atol=1e-12) and torch.equal(plain.grad, weights)  # type: ignore[arg-type]
