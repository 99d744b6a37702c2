"""Sets of single KV heads (D4 b): heads are folded into the batch, so that each row has one KV head and its own set.

Shape letters: n pages, Q query tokens, L gathered tokens, H query heads, K KV heads, G = H // K, D head dim.
"""

from __future__ import annotations

from torch import Tensor


def fold_queries(q_nQHD: Tensor, num_kv_heads: int) -> Tensor:
    """Queries by KV head: [n, Q, H, D] → [n*K, Q, G, D], a view."""
    return q_nQHD.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).flatten(0, 1)


def own_head(x_MLKD: Tensor, num_kv_heads: int) -> Tensor:
    """Of what was gathered for M = n*K single heads, the part of that head: [n*K, L, K, D] → [n*K, L, 1, D]."""
    x_nLDK = x_MLKD.unflatten(0, (-1, num_kv_heads)).diagonal(dim1=1, dim2=3)
    return x_nLDK.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(2)


def write_folded(found_MQGD: Tensor, out_nQHD: Tensor) -> None:
    """Put the attention of M = n*K single heads where all heads' belongs."""
    n, K = len(out_nQHD), len(found_MQGD) // len(out_nQHD)
    out_nQHD.unflatten(2, (K, -1)).copy_(found_MQGD.unflatten(0, (n, K)).transpose(1, 2))
