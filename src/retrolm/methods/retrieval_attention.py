"""RetrievalAttention: dense prefill, then first and recent tokens, and each query head's own best others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .base import METHODS
from .key_graph import KeyGraph, require_faiss
from .knobs import positive
from .token_base import ChunkView, Part, TokenMethod


@METHODS.register("retrieval_attention")
class RetrievalAttention(TokenMethod):
    """Tokens are found by their inner product with each query head (after RoPE, as attended): by exact search, or by a
    graph of keys for each KV head, which all its query heads search.

    The paper searches a graph index in host memory that links queries of the prompt to keys; exact search, its "flat"
    variant, is the best that any index can find. The graph here links keys to keys; it grows by the tokens that leave
    the recent ones. Static and retrieved tokens stand under one softmax, which is what combining the two outputs by
    their log-sum-exp gives.
    """

    name = "retrieval_attention"
    paper = "https://arxiv.org/abs/2409.10516"
    summary = (
        "first and recent tokens, and the best others of each query head, by exact search or a graph; dense prefill"
    )
    index = "all keys, exact search (or a graph of near neighbours)"
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
        """num_first, num_recent: static tokens; the recent ones include the current. None = by the budget.

        index: "approximate" = a graph by faiss. links, breadth: of that graph (`KeyGraph`).
        """

        num_first: int | None = None
        num_recent: int | None = None
        index: Literal["exact", "approximate"] = "exact"
        links: int = 32
        breadth: int = 128

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "num_first", "num_recent", "links", "breadth")
        if self.knobs.index == "approximate":
            require_faiss()

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
        if self.knobs.index == "exact":
            found = _inner_products(view).masked_fill(~other, -torch.inf).topk(top_k, dim=2)
            chosen = torch.zeros_like(other).expand(-1, view.q_BHQD.shape[1], -1)
            chosen = chosen.scatter(2, found.indices, found.values > -torch.inf)
        else:
            chosen = self._searched(view, other, top_k)
        return [Part(None, (chosen | static)[:, :, None], view.true_BQ, true_B1T.clamp(min=0))]

    def _searched(self, view: ChunkView, other_B1T: Tensor, top_k: int) -> Tensor:
        """The other tokens that the graphs find, bool [B, H, T]; all where there are no more than wanted."""
        B, K, _, D = view.cache.keys_BKTD.shape
        make = [[KeyGraph(D, self.knobs.links, self.knobs.breadth) for _ in range(K)] for _ in range(B)]
        graphs = view.cache.state.setdefault("graphs", make)
        chosen = other_B1T.repeat(1, view.q_BHQD.shape[1], 1)
        query_BKGD = _placed_query(view).unflatten(1, (K, -1))
        for sample, heads in enumerate(graphs):
            # They stand side by side, those that are in the graphs first.
            places_N = other_B1T[sample, 0].nonzero()[:, 0]
            keys_KnD = _placed_keys(view, sample, places_N[len(heads[0]) :])
            for graph, keys in zip(heads, keys_KnD, strict=True):
                graph.add(keys)
            if len(places_N) > top_k:
                found = torch.cat([g.search(q, top_k) for g, q in zip(heads, query_BKGD[sample], strict=True)])
                found = found.to(places_N.device)
                marks = torch.zeros(len(found), len(places_N) + 1, dtype=torch.bool, device=places_N.device)
                marks.scatter_(1, found.where(found >= 0, len(places_N)), True)
                chosen[sample][:, places_N] = marks[:, :-1]
        return chosen

    def _static(self, kv_budget: int) -> tuple[int, int]:
        """First and recent tokens."""
        num_first, num_recent = self.knobs.num_first, self.knobs.num_recent
        first = min(128, max(kv_budget // 16, 1)) if num_first is None else num_first
        return first, min(512, max(kv_budget // 4, 1)) if num_recent is None else num_recent


def _placed_query(view: ChunkView) -> Tensor:
    """The one query of each head at its position, [B, H, D]."""
    cos, sin = view.rope(view.true_BQ[:, None])
    return rotate(view.q_BHQD, cos, sin)[:, :, 0]


def _placed_keys(view: ChunkView, sample: int, places_n: Tensor) -> Tensor:
    """Keys of a sample's places at their positions, [K, n, D]."""
    cos, sin = view.rope(view.cache.true_BJT[sample, 0, places_n])
    return rotate(view.cache.keys_BKTD[sample][:, places_n], cos, sin)


def _inner_products(view: ChunkView) -> Tensor:
    """The one query's products with all keys, [B, H, T], float32 or wider."""
    cos, sin = view.rope(view.cache.true_BJT.clamp(min=0))
    wide = torch.promote_types(view.q_BHQD.dtype, torch.float32)
    query = _placed_query(view).to(wide)
    keys = rotate(view.cache.keys_BKTD, cos, sin).to(wide)
    return (query.unflatten(1, (keys.shape[1], -1)) @ keys.mT).flatten(1, 2)
