"""An approximate index of keys by inner product: a graph of near neighbours in layers (HNSW), by faiss.

Shape letters: T keys, G queries, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


def require_faiss() -> Any:
    """The library; raises `UserError` if it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError("An approximate index needs faiss: pip install 'retrolm[ann]'.") from None
    return faiss


class KeyGraph:
    """The keys of one KV head; they are numbered as they come.

    Links join keys with keys near to them. Queries lie elsewhere, so that more of the graph must be looked at than for
    a key (the paper's own graph joins queries with their keys; see docs/methods.md).

    Args:
        links: neighbours that a key is joined with. breadth: candidates that a search keeps; never fewer than wanted.
    """

    def __init__(self, head_dim: int, links: int, breadth: int) -> None:
        faiss = require_faiss()
        self._graph = faiss.IndexHNSWFlat(head_dim, links, faiss.METRIC_INNER_PRODUCT)
        self._breadth = breadth

    def __len__(self) -> int:
        return int(self._graph.ntotal)

    def add(self, keys_TD: Tensor) -> None:
        """Put keys behind those that are there."""
        if len(keys_TD):
            self._graph.add(_rows(keys_TD))

    def search(self, query_GD: Tensor, top_k: int) -> Tensor:
        """Numbers of keys with about the largest products with each query, int64 [G, top_k] on the CPU; -1 = none."""
        self._graph.hnsw.efSearch = max(self._breadth, top_k)
        _, found = self._graph.search(_rows(query_GD), top_k)
        return torch.from_numpy(found)


def _rows(x: Tensor) -> Any:
    return x.detach().to("cpu", torch.float32).contiguous().numpy()
