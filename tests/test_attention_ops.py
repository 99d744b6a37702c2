"""The fast paths of attention and rotation against what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrolm.ops.attention import attend, attend_reference, bias_from, causal_needs_no_mask, head_major
from retrolm.ops.rotary import rotate

CPU = torch.device("cpu")
SHAPES = [
    (1, 8, 8, 2, 3, 12),
    (2, 5, 17, 1, 4, 8),
    (3, 128, 700, 3, 3, 64),
    (1, 300, 411, 2, 2, 16),
    (1, 1, 30, 2, 2, 16),
]


def qkv(N: int, Q: int, T: int, K: int, G: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N + Q + T)
    shapes = [(N, Q, K * G, D), (N, T, K, D), (N, T, K, D)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def lower_right(Q: int, T: int) -> Tensor:
    return torch.ones(1, Q, T, dtype=torch.bool).tril(T - Q)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
def test_causal_attention_equals_the_reference(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, bar: float
) -> None:
    q, k, v = qkv(*shape, dtype)
    expected = attend_reference(q, k, v, lower_right(shape[1], shape[2]), 0.3)
    masked = attend(q, k, v, bias_from(lower_right(shape[1], shape[2]).expand(shape[0], -1, -1), dtype), 0.3)
    assert (attend(q, k, v, None, 0.3, causal=True) - expected).abs().max() <= bar
    assert (masked - expected).abs().max() <= bar


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_order_and_place_of_the_result_change_nothing(shape: tuple[int, int, int, int, int, int]) -> None:
    q, k, v = qkv(*shape, torch.float32)
    ordered = [head_major(x).copy_(x) for x in (q, k, v)]
    room = torch.full((q.shape[0], q.shape[1] + 3, *q.shape[2:]), torch.nan)
    found = attend(*ordered, None, 0.3, causal=True, out=room[:, : q.shape[1]])
    assert found.data_ptr() == room.data_ptr() and room[:, q.shape[1] :].isnan().all()
    assert (found - attend(q, k, v, None, 0.3, causal=True)).abs().max() <= 1e-5


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_of_the_causal_path(softcap: float | None) -> None:
    """The split path knows none; where they are wanted another one must run."""
    parts = [x.requires_grad_() for x in qkv(2, 5, 17, 2, 2, 8, torch.float64)]
    attend(*parts, None, 0.3, softcap, causal=True).square().sum().backward()
    found = [x.grad for x in parts]
    for x in parts:
        x.grad = None
    attend_reference(*parts, lower_right(5, 17), 0.3, softcap).square().sum().backward()
    assert all(torch.allclose(a, b.grad, atol=1e-12) for a, b in zip(found, parts, strict=True))


def test_half_precision_is_not_split() -> None:
    """Joining two halves that were rounded apart would lose bits."""
    assert causal_needs_no_mask(CPU, torch.float32) and not causal_needs_no_mask(CPU, torch.bfloat16)


@pytest.mark.parametrize("rotary_dims", [4, 8])
def test_rotation_into_another_layout(rotary_dims: int) -> None:
    x = torch.randn(2, 7, 3, 8)
    angles = torch.randn(7, 1, rotary_dims // 2).repeat(1, 1, 2)
    out = head_major(x).fill_(torch.nan)
    found = rotate(x, angles.cos(), angles.sin(), out)
    assert found is out and torch.equal(found, rotate(x, angles.cos(), angles.sin()))
    half = rotary_dims // 2
    turned = torch.view_as_complex(torch.stack([x[..., :half], x[..., half:rotary_dims]], -1))
    turned = turned * torch.polar(torch.ones(7, 1, half), angles[..., :half])
    assert torch.allclose(found[..., :rotary_dims], torch.cat([turned.real, turned.imag], -1), atol=1e-6)
