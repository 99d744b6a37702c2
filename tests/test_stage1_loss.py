"""F8: the contrastive loss is cross-entropy with one positive; with several it is what the formula says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrolm.training.stage1.loss import attention_kl, info_nce
from retrolm.training.stage1.recall import layer_hits

scores_strategy = st.lists(st.floats(-20, 20), min_size=2, max_size=12)


def one_positive(scores: list[float], positive: int) -> tuple[Tensor, Tensor, Tensor]:
    scores_BP = torch.tensor([scores], dtype=torch.float64, requires_grad=True)
    positive_BP = torch.zeros(1, len(scores), dtype=torch.bool)
    positive_BP[0, positive] = True
    return scores_BP, positive_BP, ~positive_BP


@settings(deadline=None)
@given(scores=scores_strategy, data=st.data())
def test_one_positive_is_cross_entropy(scores: list[float], data: st.DataObject) -> None:
    positive = data.draw(st.integers(0, len(scores) - 1))
    scores_BP, positive_BP, negative_BP = one_positive(scores, positive)
    loss = info_nce(scores_BP, positive_BP, negative_BP)
    (gradient,) = torch.autograd.grad(loss.sum(), scores_BP)
    expected = torch.nn.functional.cross_entropy(scores_BP, torch.tensor([positive]), reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), scores_BP)
    assert torch.allclose(loss, expected, atol=1e-12)
    assert torch.allclose(gradient, expected_gradient, atol=1e-12)


def test_several_positives_by_hand() -> None:
    """Two positives, two negatives, one page left out; each positive competes with the negatives alone."""
    scores = torch.tensor([[1.0, 2.0, 0.5, -1.0, 9.0]], dtype=torch.float64)
    positive = torch.tensor([[True, True, False, False, False]])
    negative = torch.tensor([[False, False, True, True, False]])
    others = math.exp(0.5) + math.exp(-1.0)
    expected = -sum(math.log(math.exp(s) / (math.exp(s) + others)) for s in (1.0, 2.0)) / 2
    assert info_nce(scores, positive, negative).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_pages", [2, 7, 64])
def test_ties_give_the_logarithm_of_the_pages(num_pages: int) -> None:
    """All scores alike, as in layer 0: log(m - 1) with m - 1 text pages."""
    scores_BP, positive_BP, negative_BP = one_positive([3.25] * num_pages, num_pages // 2)
    assert info_nce(scores_BP, positive_BP, negative_BP).item() == pytest.approx(math.log(num_pages), abs=1e-12)


@pytest.mark.parametrize("kind", ["no positive", "no negative", "neither"])
def test_samples_without_a_contest_cost_nothing(kind: str) -> None:
    scores = torch.randn(1, 5, requires_grad=True)
    positive = torch.zeros(1, 5, dtype=torch.bool)
    negative = torch.zeros(1, 5, dtype=torch.bool)
    positive[0, :2] = kind == "no negative"
    negative[0, 2:] = kind == "no positive"
    loss = info_nce(scores, positive, negative)
    loss.sum().backward()
    assert loss.item() == 0.0
    assert scores.grad is not None and not bool(scores.grad.any())


def test_huge_scores_stay_finite() -> None:
    scores = torch.tensor([[4000.0, -4000.0, 30000.0]], requires_grad=True)
    loss = info_nce(scores, torch.tensor([[False, True, False]]), torch.tensor([[True, False, True]]))
    loss.sum().backward()
    assert loss.item() == 34000.0
    assert scores.grad is not None and torch.equal(scores.grad, torch.tensor([[0.0, -1.0, 1.0]]))


@settings(deadline=None)
@given(scores=scores_strategy, seed=st.integers(0, 9))
def test_divergence_is_torchs_and_least_at_the_target(scores: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_BP = torch.tensor([[*scores, 0.0]], dtype=torch.float64)
    there_BP = torch.ones_like(scores_BP, dtype=torch.bool)
    there_BP[0, -1] = False
    share_BP = torch.rand(scores_BP.shape, generator=generator, dtype=torch.float64) * there_BP
    share_BP[0, 0] = 0.0  # a page without attention
    share_BP /= share_BP.sum()
    found = attention_kl(scores_BP, share_BP, there_BP)
    model = scores_BP[:, :-1].log_softmax(1)
    expected = torch.nn.functional.kl_div(model, share_BP[:, :-1], reduction="sum")
    assert found.item() == pytest.approx(expected.item(), abs=1e-9) and found.item() > -1e-12
    perfect = attention_kl(share_BP.clamp(min=1e-300).log(), share_BP, there_BP)
    assert perfect.item() == pytest.approx(0.0, abs=1e-12)


def test_divergence_gives_padding_no_gradient() -> None:
    scores = torch.randn(2, 4, requires_grad=True)
    there = torch.tensor([[True, True, True, False], [True, True, True, True]])
    share = there / there.sum(1, keepdim=True)
    attention_kl(scores, share, there).sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and scores.grad[0, 3] == 0


def test_recall_counts_what_has_to_be_found() -> None:
    """12 pages, the first 11 free: 8 best of these count; samples that prove nothing are NaN."""
    scores = torch.arange(12.0).flip(0).expand(5, -1)  # page 0 is best
    gold = torch.zeros(5, 12, dtype=torch.bool)
    gold[0, 7] = gold[1, 8] = gold[2, 11] = True  # in the 8 best, just outside, in the page that is attended anyway
    gold[3, :5] = True  # more than 4
    free = torch.arange(12).expand(5, -1) < 11
    found = layer_hits(scores, gold, free)
    assert found[:2].tolist() == [1.0, 0.0] and found[2:].isnan().all()
