"""TokenSelect: each chunk attends the tokens that its heads vote for together, between the first and the local ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .base import METHODS
from .knobs import positive
from .token_base import ChunkView, Part, TokenMethod, distance, places_of, true_at


@dataclass(frozen=True)
class _Split:
    """Tokens of the budget: first, local, and of a chunk."""

    num_init: int
    num_local: int
    chunk: int


@METHODS.register("tokenselect")
class TokenSelect(TokenMethod):
    """Votes: the chunk's mean query against every candidate key, softmax over candidates per head, sum over heads.

    Queries are rotated as if behind the local window, keys are not (as published); logits carry no 1/√D. A query head
    votes with the key head of its own group (the released kernel pairs them otherwise). The chunk counts inside the
    budget, so fewer tokens are selected while reading than while answering.
    """

    name = "tokenselect"
    paper = "https://arxiv.org/abs/2411.02886"
    summary = "tokens that all heads vote for, chosen for each chunk and each generated token"
    index = "all keys"
    query = "mean query of the chunk"
    budget_split = "128 first + 512 local + chunk (512 reading, 1 answering) + the rest selected; less at small budgets"
    keeps = "all tokens, on the device"
    positions = "compact: first, selected, local, chunk at 0, 1, 2, …"
    exact_when = "kv_budget ≥ prompt and answer"

    @dataclass(frozen=True)
    class Knobs:
        """num_init, num_local: first and local tokens. chunk: tokens read at a time; None = by the budget.

        pool: largest vote within a window of so many candidates (0 = off). reuse: choose again only if the mean query
        is less alike than this cosine to the one that chose last (1.0 = always, as in the released settings).
        """

        num_init: int | None = None
        num_local: int | None = None
        chunk: int | None = None
        pool: int = 0
        reuse: float = 1.0

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "num_init", "num_local", "chunk")

    def check_budget(self, kv_budget: int) -> None:
        split = self._split(kv_budget)
        needed = split.num_init + split.num_local + split.chunk + 1
        self._refuse_budget(kv_budget, needed, "first and local tokens, the chunk and one selected token")

    def chunk_tokens(self, kv_budget: int) -> int:
        return self._split(kv_budget).chunk

    def select(self, view: ChunkView) -> list[Part] | None:
        new = view.new
        if new.is_prefill and max(map(sum, zip(new.before, new.num_new, strict=True))) <= view.kv_budget:
            return None
        true_B1T = view.cache.true_BJT
        places = places_of(self._chosen(view, true_B1T), view.kv_budget)
        chosen = true_at(view.cache, places)
        placed = (chosen >= 0).cumsum(-1).sub(1).clamp(min=0)
        first = (chosen >= 0).sum(-1)[:, 0] - new.counts
        q_positions = first[:, None] + torch.arange(view.num_queries, device=placed.device)
        return [Part(places, distance(view.true_BQ, chosen) >= 0, q_positions.clamp(min=0), placed)]

    def _chosen(self, view: ChunkView, true_B1T: Tensor) -> Tensor:
        """What the chunk attends, its own tokens included, bool [B, 1, T]."""
        split = self._split(view.kv_budget)
        local_from = (view.starts - split.num_local)[:, None, None]
        forced = (true_B1T >= 0) & ((true_B1T < split.num_init) | (true_B1T >= local_from))
        candidates = (true_B1T >= 0) & ~forced
        votes = self._votes(view, candidates)
        room = view.kv_budget - split.num_init - split.num_local - view.new.counts[:, None, None]
        # Of equal votes the later token is taken: sort the reversed row.
        order = votes.flip(-1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).flip(-1)
        return forced | (candidates & (order < room))

    def _votes(self, view: ChunkView, candidates_B1T: Tensor) -> Tensor:
        """Votes for each place, float32 [B, 1, T]; -inf for places that are no candidates."""
        query = self._remembered(view, self._mean_query(view))
        keys = view.cache.keys_BKTD
        grouped = query.unflatten(1, (keys.shape[1], -1))
        logits = torch.einsum("bkgd,bktd->bkgt", grouped, keys.to(grouped.dtype)).flatten(1, 2)
        shares = logits.masked_fill(~candidates_B1T, -torch.inf).softmax(-1).nan_to_num(0.0)
        votes = shares.sum(1, keepdim=True)
        if self.knobs.pool > 1:
            pad = self.knobs.pool // 2
            votes = torch.nn.functional.max_pool1d(votes, self.knobs.pool, 1, pad)[..., : votes.shape[-1]]
        return votes.masked_fill(~candidates_B1T, -torch.inf)

    def _mean_query(self, view: ChunkView) -> Tensor:
        """The chunk's queries, rotated behind the local window, mean over its tokens, [B, H, D] float32 or wider."""
        first = self._split(view.kv_budget).num_local
        cos, sin = view.rope(first + torch.arange(view.num_queries, device=view.q_BHQD.device))
        wide = torch.promote_types(view.q_BHQD.dtype, torch.float32)
        real = (view.true_BQ >= 0)[:, None, :, None]
        rotated = rotate(view.q_BHQD, cos, sin).to(wide).masked_fill(~real, 0)
        return rotated.sum(2) / real.sum(2).clamp(min=1)

    def _remembered(self, view: ChunkView, query_BHD: Tensor) -> Tensor:
        """The selection cache: the query that chose last stands in for one that is alike."""
        before = view.cache.state.get("query")
        if before is not None and self.knobs.reuse < 1:
            alike = torch.cosine_similarity(query_BHD.flatten(1), before.flatten(1), dim=1) >= self.knobs.reuse
            query_BHD = torch.where(alike[:, None, None], before, query_BHD)
        real = (view.new.counts > 0)[:, None, None]
        view.cache.state["query"] = query_BHD if before is None else torch.where(real, query_BHD, before)
        return query_BHD

    def _split(self, kv_budget: int) -> _Split:
        def given(value: int | None, default: int) -> int:
            return default if value is None else value

        return _Split(
            given(self.knobs.num_init, min(128, kv_budget // 16)),
            given(self.knobs.num_local, min(512, kv_budget // 4)),
            given(self.knobs.chunk, min(512, kv_budget // 4)),
        )
