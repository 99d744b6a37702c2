"""Page methods that can also score pages for each KV head apart (D4 b)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PageMethod


class ScoresHeads(PageMethod):
    """A method whose probes and digests hold one vector per KV head, laid out […, K, D] and flattened."""

    def score_heads(self, probe_NF: Tensor, digest_PE: Tensor, num_kv_heads: int) -> Tensor:
        """Scores of past pages for each KV head, float32 [N, K, P]; summed over K they are `score`."""
        probe, digest = (_by_head(x, num_kv_heads) for x in (probe_NF, digest_PE.to(probe_NF.dtype)))
        return torch.einsum("nkf,pkf->nkp", probe, digest)


def _by_head(rows_NF: Tensor, num_kv_heads: int) -> Tensor:
    return rows_NF.unflatten(1, (num_kv_heads, -1))
