"""Grouped softmax: equal to loops over groups, gradients too; plain softmax where landmarks say what blocks hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from naive_landmark import naive_attention, naive_weights
from retrolm.ops.landmark_attention import grouped_attention, grouped_softmax

BLOCK = 4


def random_parts(num_kv: int, num_places: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, num_places, 6), (2, num_kv, num_places, 6), (2, num_kv, num_places, 6)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 for shape in shapes]


@pytest.mark.parametrize("num_kv", [1, 2, 4])
@pytest.mark.parametrize("num_places", [1, 4, 5, 11])
def test_attention_and_its_gradients_are_those_of_loops(num_kv: int, num_places: int) -> None:
    ours, theirs = ([x.clone().requires_grad_() for x in random_parts(num_kv, num_places)] for _ in range(2))
    found = grouped_attention(*ours, BLOCK, 0.4)
    expected = naive_attention(*theirs, BLOCK, 0.4)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * pull).sum().backward()
    (expected * pull).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("block", [2, 3, 5])
def test_weights_sum_to_one_and_landmarks_have_none(block: int) -> None:
    logits = torch.randn(3, 17, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    weights = grouped_softmax(logits, torch.arange(17), block)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 17, dtype=torch.float64))
    assert not weights[..., block - 1 :: block].any() and not weights.triu(1).any()
    for place in range(17):
        assert torch.allclose(weights[0, place], naive_weights(logits[0, place], place, block), rtol=0, atol=1e-12)


def test_landmarks_that_hold_their_block_give_plain_softmax() -> None:
    """With each landmark's logit at the log-sum-exp of its tokens' logits, grouping changes nothing."""
    logits = torch.randn(9, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for b in range(3):
        logits[:, b * 5 + 4] = logits[:, b * 5 : b * 5 + 4].logsumexp(-1)
    places = torch.arange(6, 15)
    plain = logits.clone()
    plain[:, 4::5] = -torch.inf
    plain = plain.masked_fill(torch.arange(15) > places[:, None], -torch.inf).softmax(-1)
    assert torch.allclose(grouped_softmax(logits, places, 5), plain, rtol=0, atol=1e-14)


def test_a_landmark_query_does_not_see_itself() -> None:
    q, k, v = random_parts(2, 8)
    at_first = grouped_attention(q, k, v, BLOCK, 1.0)
    k[:, :, BLOCK - 1], v[:, :, BLOCK - 1] = 50.0, 50.0  # the first block's landmark
    moved = (grouped_attention(q, k, v, BLOCK, 1.0) - at_first).abs().amax((0, 1, 3))
    assert float(moved[:BLOCK].max()) == 0.0 and float(moved[BLOCK:].min()) > 1e-3


def test_what_comes_after_a_query_changes_nothing() -> None:
    """Not even numbers that are none."""
    q, k, v = random_parts(2, 11)
    whole = grouped_attention(q, k, v, BLOCK, 1.0)
    logits = (q[0, :1] @ k[0, :1].mT)[0, :9]
    poisoned = logits.masked_fill(torch.arange(11) > torch.arange(9)[:, None], torch.nan)
    weights = grouped_softmax(poisoned, torch.arange(9), BLOCK)
    assert torch.allclose((weights @ v[0, 0]), whole[0, 0, :9], rtol=0, atol=1e-12)


def test_blocks_without_weight_have_no_gradient() -> None:
    """Weights that vanish leave gradients finite, in float32 and in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        parts = [(x * 40).to(dtype).requires_grad_() for x in random_parts(2, 11)]
        grouped_attention(*parts, BLOCK, 1.0).float().sum().backward()
        assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in parts)


def test_bfloat16_is_near() -> None:
    parts = random_parts(2, 40)
    found = grouped_attention(*(x.bfloat16() for x in parts), BLOCK, 0.4)
    expected = grouped_attention(*parts, BLOCK, 0.4)
    assert found.dtype == torch.bfloat16 and float((found - expected).abs().max()) < 0.06
