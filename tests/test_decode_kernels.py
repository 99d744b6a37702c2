"""The Triton kernels of decoding against their plain PyTorch forms.

They run on a GPU, or on a CPU with TRITON_INTERPRET=1, whose matrix products know no bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrolm.ops import decode_layer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_matmul")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    """Within the rounding of the dtype, relative to the largest number."""
    bar = TOLERANCE[expected.dtype] * max(1.0, float(expected.float().abs().max()))
    assert torch.isfinite(found.float()).all()
    assert float((found.cpu().float() - expected.float()).abs().max()) <= bar


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 896, 4096])
def test_norm(width: int, dtype: torch.dtype) -> None:
    x, weight = noise(3, width, dtype=dtype), noise(width, dtype=dtype, seed=1)
    found = decode_layer.kernels().rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    close(found, decode_layer.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(48,), (896, 128, 128), (63, 5, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [111, 1100])
def test_one_row_times_several_weights(sizes: tuple[int, ...], bias: bool, width: int, dtype: torch.dtype) -> None:
    x = noise(1, width, dtype=dtype)
    weights = [noise(size, width, dtype=dtype, seed=size) * width**-0.5 for size in sizes]
    biases = [noise(size, dtype=dtype, seed=7) if bias and size != 5 else None for size in sizes]
    residual = noise(1, sum(sizes), dtype=dtype, seed=3) if len(sizes) == 1 else None
    found = decode_layer.kernels().project_row(
        x.to(DEVICE),
        [w.to(DEVICE) for w in weights],
        [None if b is None else b.to(DEVICE) for b in biases],
        None if residual is None else residual.to(DEVICE),
    )
    close(found, decode_layer.project(x, weights, biases, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 48), (111, 1030)])
def test_gated_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = noise(1, shape[1], dtype=dtype)
    gate, up = (noise(*shape, dtype=dtype, seed=seed) * shape[1] ** -0.5 for seed in (1, 2))
    found = decode_layer.kernels().gated_row(x.to(DEVICE), gate.to(DEVICE), up.to(DEVICE))
    close(found, decode_layer.gated(x, gate, up, (None, None)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dim", "normed"),
    [((4, 4), 64, False), ((8, 2), 128, False), ((8, 1), 96, False), ((4, 2), 12, False), ((8, 2), 128, True)],
)
def test_heads_are_rotated_and_placed(heads: tuple[int, int], dim: int, normed: bool, dtype: torch.dtype) -> None:
    num_heads, num_kv_heads = heads
    qkv = noise(2, (num_heads + 2 * num_kv_heads) * dim, dtype=dtype)
    angles = noise(2, dim // 2, dtype=torch.float32, seed=1).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = (noise(dim, dtype=dtype, seed=2), noise(dim, dtype=dtype, seed=3)) if normed else None
    index = torch.tensor([5])
    keys = torch.full((2, num_kv_heads, 9, dim), torch.nan, dtype=dtype)
    values = keys.clone()
    on_device = [x.to(DEVICE, copy=True) for x in (keys, values)]
    expected = decode_layer.place_heads(qkv, cos, sin, keys, values, index, norms, 1e-6)
    found = decode_layer.kernels().place_heads(
        qkv.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), *on_device, index.to(DEVICE),
        norms and tuple(x.to(DEVICE) for x in norms), 1e-6,
    )  # fmt: skip
    close(found, expected)
    for got, want in zip(on_device, (keys, values), strict=True):
        close(got[:, :, 5], want[:, :, 5])
        rest = [0, 1, 2, 3, 4, 6, 7, 8]
        assert got[:, :, rest].isnan().all()


PLAIN = (None, None)
TOKEN_CASES = [
    *(((8, 2), dim, 111, PLAIN, dtype) for dim in (64, 96, 128) for dtype in DTYPES),
    *((heads, 64, 111, PLAIN, torch.bfloat16) for heads in ((2, 2), (8, 1), (14, 2))),
    *(((8, 2), 128, index, PLAIN, torch.bfloat16) for index in (0, 63, 1000, 2300)),
    *(((8, 2), 128, 1000, further, torch.float32) for further in ((30.0, None), (None, 40), (30.0, 40))),
]


@pytest.mark.parametrize(("heads", "dim", "index", "further", "dtype"), TOKEN_CASES)
def test_attention_of_one_token(
    heads: tuple[int, int],
    dim: int,
    index: int,
    further: tuple[float | None, int | None],
    dtype: torch.dtype,
) -> None:
    """Places that may not be attended hold NaN for the kernel, which must not read them."""
    num_heads, num_kv_heads = heads
    places = index + 20
    q = noise(2, num_heads, dim, dtype=dtype)
    keys, values = (noise(2, num_kv_heads, places, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    starts = torch.tensor([0, index // 2])
    place = torch.tensor([index])
    expected = decode_layer.attend_token(q, keys, values, starts, place, dim**-0.5, *further)
    for row, start in enumerate(starts.tolist()):
        for cache in (keys, values):
            cache[row, :, :start] = torch.nan
            cache[row, :, index + 1 :] = torch.nan
    on_device = [x.to(DEVICE) for x in (q, keys, values, starts, place)]
    close(decode_layer.kernels().attend_token(*on_device, dim**-0.5, *further), expected)
