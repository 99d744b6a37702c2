"""RetrievalAttention: dense prefill, then first and recent tokens, and each query head's own best others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .base import METHODS
from .knobs import positive
from .token_base import ChunkView, Part, TokenMethod


@METHODS.register("retrieval_attention")
class RetrievalAttention(TokenMethod):
    """Tokens are found by their exact inner product with each query head (after RoPE, as attended).

    The paper searches an approximate graph index in host memory that links queries of the prompt to keys; exact search,
    its "flat" variant, is the best that such an index can find. Static and retrieved tokens stand under one softmax,
    which is what combining the two outputs by their log-sum-exp gives.
    """

    name = "retrieval_attention"
    paper = "https://arxiv.org/abs/2409.10516"
    summary = "first and recent tokens, and the best others of each query head by exact search; dense prefill"
    index = "all keys, exact search"
    query = "newest token's queries"
    scope = "layer and query head"
    when = "each generated token"
    prefill = "dense"
    budget_split = "128 first + 512 recent + best tokens of each query head"
    keeps = "all tokens, on the device (the paper keeps the searched ones in host memory)"
    positions = "true"
    exact_when = "kv_budget ≥ prompt and answer"
    true_positions = True

    @dataclass(frozen=True)
    class Knobs:
        """num_first, num_recent: static tokens; the recent ones include the current. None = by the budget."""

        num_first: int | None = None
        num_recent: int | None = None

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "num_first", "num_recent")

    def check_budget(self, kv_budget: int) -> None:
        needed = max(sum(self._static(kv_budget)) + 1, 16)
        self._refuse_budget(kv_budget, needed, "first and recent tokens and one to find")

    def select(self, view: ChunkView) -> list[Part] | None:
        if view.new.is_prefill:
            return None
        num_first, num_recent = self._static(view.kv_budget)
        true_B1T = view.cache.true_BJT
        recent = true_B1T > view.true_BQ[:, None, :] - num_recent
        static = (true_B1T >= 0) & (recent | (true_B1T < num_first))
        other = (true_B1T >= 0) & ~static
        top_k = min(view.kv_budget - num_first - num_recent, view.cache.num_places)
        found = _inner_products(view).masked_fill(~other, -torch.inf).topk(top_k, dim=2)
        chosen = torch.zeros_like(other).expand(-1, view.q_BHQD.shape[1], -1)
        chosen = chosen.scatter(2, found.indices, found.values > -torch.inf) | static
        return [Part(None, chosen[:, :, None], view.true_BQ, true_B1T.clamp(min=0))]

    def _static(self, kv_budget: int) -> tuple[int, int]:
        """First and recent tokens."""
        num_first, num_recent = self.knobs.num_first, self.knobs.num_recent
        first = min(128, max(kv_budget // 16, 1)) if num_first is None else num_first
        return first, min(512, max(kv_budget // 4, 1)) if num_recent is None else num_recent


def _inner_products(view: ChunkView) -> Tensor:
    """The one query's products with all keys, [B, H, T], float32 or wider."""
    query_cos, query_sin = view.rope(view.true_BQ[:, None])
    cos, sin = view.rope(view.cache.true_BJT.clamp(min=0))
    wide = torch.promote_types(view.q_BHQD.dtype, torch.float32)
    query = rotate(view.q_BHQD, query_cos, query_sin)[:, :, 0].to(wide)
    keys = rotate(view.cache.keys_BKTD, cos, sin).to(wide)
    return (query.unflatten(1, (keys.shape[1], -1)) @ keys.mT).flatten(1, 2)
