"""The Triton kernels of paged steps against their plain PyTorch forms.

They run on a GPU, or on a CPU with TRITON_INTERPRET=1, whose matrix products know no bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrolm.ops import paged_attention as ops
from retrolm.ops.paged_attention import PagesToRead, Tally

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_matmul")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert torch.equal(torch.isfinite(found), torch.isfinite(expected))
    apart = (found - expected).nan_to_num(0.0, 0.0, 0.0).abs().max()
    assert float(apart) <= TOLERANCE[dtype] * max(1.0, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()))


def tally(B: int, H: int, Q: int) -> Tally:
    most = torch.zeros(5, B, dtype=torch.int32, device=DEVICE)
    return Tally(torch.ones(B, H, Q, dtype=torch.int64, device=DEVICE), most, torch.tensor([3], device=DEVICE))


def pages_read(kind: str, B: int, K: int, P: int, newest_B: Tensor) -> PagesToRead:
    if kind == "all":
        return PagesToRead(None)
    make = torch.Generator().manual_seed(7)
    J = 1 if kind == "shared" else K
    pages = torch.rand(B, J, P, generator=make).argsort(-1)[:, :, : P // 2 + 1].to(DEVICE)
    last = (newest_B.cpu()[:, None, None] - torch.randint(0, 4, pages.shape, generator=make)).to(DEVICE)
    return PagesToRead(pages, last if kind == "after" else None, last if kind == "until" else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["all", "shared", "own", "after", "until"])
@pytest.mark.parametrize(
    ("heads", "dim", "page", "num_queries"), [((4, 4), 64, 16, 1), ((14, 2), 64, 16, 4), ((8, 1), 12, 5, 3)]
)
def test_attention_over_pages(
    heads: tuple[int, int], dim: int, page: int, num_queries: int, kind: str, dtype: torch.dtype
) -> None:
    (H, K), B, P, Q = heads, 2, 9, num_queries
    newest = torch.tensor([6 * page + 2, 1], device=DEVICE)
    true = newest[:, None] + torch.arange(1 - Q, 1, device=DEVICE)
    true = true.masked_fill(true < 0, -1)
    q = noise(B, H, Q, dim, dtype=dtype)
    keys, values = (noise(B, K, P, page, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    read, counts = pages_read(kind, B, K, P, newest), [tally(B, H, Q) for _ in range(2)]
    expected = ops.attend_pages_reference(q, keys, values, read, true, counts[0], 0.3, 5.0 if Q == 3 else None)
    from retrolm.ops import paged_attention_kernel as kernels

    found = kernels.attend_pages(q, keys, values, read, true, counts[1], 0.3, 5.0 if Q == 3 else None)
    for one, other in zip(found, expected, strict=True):
        close(one, other, dtype)
    assert torch.equal(counts[0].sums_BHQ, counts[1].sums_BHQ) and counts[1].sums_BHQ.max() > 1
    assert torch.equal(counts[0].most_SB, counts[1].most_SB) and bool(counts[1].most_SB[3].any())


@pytest.mark.parametrize(("num_queries", "dim"), [(2, 64), (5, 12), (1, 16)])
def test_merging_with_the_last_step(num_queries: int, dim: int) -> None:
    B, H, Q = 2, 3, num_queries
    old, out = (noise(B, H, Q, dim, dtype=torch.float32, seed=seed) for seed in (1, 2))
    old_lse, lse = (noise(B, H, Q, dtype=torch.float32, seed=seed) for seed in (3, 4))
    old_lse[0, 1], lse[0, 0], lse[0, 1] = -torch.inf, -torch.inf, -torch.inf
    state = [old.clone(), old_lse.clone()]

    def shift(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x[:, :, 1:], torch.full_like(x[:, :, :1], fill)], 2)

    expected = ops.merge_attention(shift(old, 0.0), shift(old_lse, -torch.inf), out, lse)
    from retrolm.ops import paged_attention_kernel as kernels

    found = kernels.merge_shifted(*state, out, lse)
    close(found, expected[0], torch.float32)
    close(state[0], expected[0], torch.float32)
    close(state[1], expected[1], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "dim", "num_pages"), [(7, 64, 33), (1, 12, 5)])
def test_bounds_of_pages(group: int, dim: int, num_pages: int, dtype: torch.dtype) -> None:
    query = noise(2, 3, group, dim, dtype=dtype)
    corners = [noise(2, 3, num_pages, dim, dtype=dtype, seed=seed) for seed in (1, 2)]
    low, high = torch.minimum(*corners), torch.maximum(*corners)
    from retrolm.ops import paged_attention_kernel as kernels

    found = kernels.page_bounds(query, low, high)
    wide = [x.float() for x in (query, low, high)]
    each = torch.maximum(wide[0][..., None, :] * wide[1][:, :, None], wide[0][..., None, :] * wide[2][:, :, None])
    close(found, each.sum(-1), torch.float32)
