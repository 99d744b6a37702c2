"""Attention over several key sets under one softmax: the fast path against the written-out one, and that by hand."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrolm.ops.joint_attention import KeySet, attend_sets, attend_sets_lse, attend_sets_reference
from retrolm.ops.merge_attention import merge_attention


def key_sets(seed: int, B: int, K: int, G: int, Q: int, sizes: list[int], per_head: bool, D: int = 4) -> list[KeySet]:
    make = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    return [
        KeySet(
            noise(B, K * G, Q, D),
            noise(B, K, S, D),
            noise(B, K, S, D),
            torch.rand(B, K if per_head else 1, Q, S, generator=make) < 0.6,
        )
        for S in sizes
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    B=st.integers(1, 3),
    K=st.integers(1, 3),
    G=st.sampled_from([1, 2, 4]),
    Q=st.integers(1, 7),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    per_head=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
)
def test_the_fast_path_equals_the_reference(
    seed: int, B: int, K: int, G: int, Q: int, sizes: list[int], per_head: bool, softcap: float | None
) -> None:
    sets = key_sets(seed, B, K, G, Q, sizes, per_head)
    expected, weights = attend_sets_reference(sets, 0.5, softcap)
    seen = torch.cat([one.allowed_BJQS for one in sets], -1).any(-1).expand(-1, K, -1).repeat_interleave(G, 1)
    found = attend_sets(sets, 0.5, softcap)
    assert found.isfinite().all()
    assert torch.allclose(found[seen], expected[seen], atol=1e-12)
    assert not expected[~seen].any()
    total = sum(part.sum(-1) for part in weights)
    assert torch.allclose(total, seen.to(total))


def test_the_reference_equals_loops() -> None:
    B, K, G, Q = 1, 2, 2, 3
    sets = key_sets(0, B, K, G, Q, [4, 5], per_head=True)
    out, _ = attend_sets_reference(sets, 0.7)
    for head in range(K * G):
        for query in range(Q):
            pairs = [
                (float(one.q_BHQD[0, head, query] @ one.k_BKSD[0, head // G, key]) * 0.7, one.v_BKSD[0, head // G, key])
                for one in sets
                for key in range(one.k_BKSD.shape[2])
                if one.allowed_BJQS[0, head // G, query, key]
            ]
            total = sum(math.exp(logit) for logit, _ in pairs)
            expected = sum((math.exp(logit) / total * value for logit, value in pairs), torch.zeros(4))
            assert torch.allclose(out[0, head, query], expected)


def test_query_heads_may_attend_keys_of_their_own() -> None:
    (one,) = key_sets(1, 2, 2, 3, 4, [7], per_head=False)
    allowed = torch.rand(2, 6, 4, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    allowed[..., 0] = True
    together = KeySet(one.q_BHQD, one.k_BKSD, one.v_BKSD, allowed)
    expected, _ = attend_sets_reference([together], 0.5)
    assert torch.allclose(attend_sets([together], 0.5), expected, atol=1e-12)
    for head in range(6):
        kv = slice(head // 3, head // 3 + 1)
        alone = KeySet(
            one.q_BHQD[:, head : head + 1], one.k_BKSD[:, kv], one.v_BKSD[:, kv], allowed[:, head : head + 1]
        )
        assert torch.allclose(attend_sets_reference([alone], 0.5)[0], expected[:, head : head + 1], atol=1e-12)


def test_outputs_of_two_sets_merge_into_one_softmax() -> None:
    sets = key_sets(3, 2, 2, 2, 5, [4, 6], per_head=True)
    parts = [attend_sets_lse([one], 0.5) for one in sets]
    out, lse = merge_attention(*parts[0], *parts[1])
    assert torch.allclose(out, attend_sets_reference(sets, 0.5)[0], atol=1e-12)
    assert torch.allclose(lse, attend_sets_lse(sets, 0.5)[1], atol=1e-12)
