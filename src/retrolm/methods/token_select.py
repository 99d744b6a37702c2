"""TokenSelect: each chunk attends the tokens that its heads vote for together, between the first and the local ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .base import METHODS
from .knobs import positive
from .token_base import (
    ChunkView,
    Part,
    TokenMethod,
    best_places,
    distance,
    mean_query,
    places_of,
    positions_at,
)


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
        split, true_B1T = self._split(view.kv_budget), view.cache.true_BJT
        query, taken = self._remembered(view, self._mean_query(view)), self._num_taken(view, split)
        layout = view.once(_layout, true_B1T, new.true_BQ, new.starts, new.counts, split, taken)
        if not max(taken):
            return [layout.part]
        selected = best_places(self._votes(view, query, layout.candidates_B1T), max(taken))
        if min(taken) < max(taken):
            selected = selected.masked_fill(layout.too_many_B1n, -1)
        places = torch.cat([layout.first_B1S, selected.sort().values, layout.last_B1S], 2)
        return [dataclasses.replace(layout.part, places_BJS=places)]

    def _num_taken(self, view: ChunkView, split: _Split) -> tuple[int, ...]:
        """Tokens that each sample selects: what there is room for, or all candidates."""
        static = split.num_init + split.num_local
        numbers = zip(view.new.before, view.new.num_new, strict=True)
        return tuple(max(min(view.kv_budget - static - new, before - static), 0) for before, new in numbers)

    def _votes(self, view: ChunkView, query_BHD: Tensor, candidates_B1T: Tensor) -> Tensor:
        """Votes for each place, float32 [B, 1, T]; -inf for places that are no candidates."""
        keys = view.cache.keys_BKTD
        logits = query_BHD.unflatten(1, (keys.shape[1], -1)) @ keys.to(query_BHD.dtype).mT
        others = view.once(torch.logical_not, candidates_B1T)
        shares = logits.masked_fill(others[:, None], -torch.inf).softmax(-1)
        if view.new.has_padding or min(view.new.before) < max(view.new.before):
            shares = shares.nan_to_num(0.0)  # of a sample without candidates
        # In float32: a token's keys of the first layer are equal wherever it stands, and float64 may round them apart.
        votes = shares.sum((1, 2))[:, None].float()
        if self.knobs.pool > 1:
            pad = self.knobs.pool // 2
            votes = torch.nn.functional.max_pool1d(votes, self.knobs.pool, 1, pad)[..., : votes.shape[-1]]
        return votes.masked_fill(others, -torch.inf)

    def _mean_query(self, view: ChunkView) -> Tensor:
        """The chunk's queries, rotated behind the local window, mean over its tokens, [B, H, D] float32 or wider."""
        first = self._split(view.kv_budget).num_local
        places = view.once(torch.arange, first, first + view.num_queries)
        return mean_query(view, rotate(view.q_BHQD, *view.once(view.rope, places)))

    def _remembered(self, view: ChunkView, query_BHD: Tensor) -> Tensor:
        """The selection cache: the query that chose last stands in for one that is alike."""
        if self.knobs.reuse >= 1:
            return query_BHD
        before = view.cache.state.get("query")
        if before is not None:
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


@dataclass(frozen=True)
class _Layout:
    """What a chunk attends in all layers, but for which tokens are selected.

    Attributes:
        first_B1S, last_B1S: places of the first tokens, and of the local ones with the chunk; -1 = none.
        candidates_B1T: which places can be selected. too_many_B1n: which of the best ones a sample has no room for.
        part: first, selected and last tokens; its places are those of the first and last ones.
    """

    first_B1S: Tensor
    last_B1S: Tensor
    candidates_B1T: Tensor
    too_many_B1n: Tensor
    part: Part


def _layout(
    true_B1T: Tensor, true_BQ: Tensor, starts_B: Tensor, counts_B: Tensor, split: _Split, taken: tuple[int, ...]
) -> _Layout:
    num_queries, device = true_BQ.shape[1], true_B1T.device
    there = true_B1T >= 0
    is_first = there & (true_B1T < split.num_init)
    is_last = there & ~is_first & (true_B1T >= (starts_B - split.num_local)[:, None, None])
    first, last = places_of(is_first, split.num_init), places_of(is_last, split.num_local + num_queries)
    too_many = (
        torch.arange(max(taken), device=device) >= torch.tensor(taken).to(device, non_blocking=True)[:, None, None]
    )
    selected = torch.zeros_like(too_many, dtype=torch.int64).masked_fill(too_many.flip(-1), -1)
    true_B1S = torch.cat([positions_at(true_B1T, first), selected, positions_at(true_B1T, last)], 2)
    placed = (true_B1S >= 0).cumsum(-1).sub(1).clamp(min=0)
    begin_B1 = (true_B1S >= 0).sum(-1) - counts_B[:, None]
    q_positions = (begin_B1 + torch.arange(num_queries, device=device)).clamp(min=0)
    part = Part(torch.cat([first, last], 2), distance(true_BQ, true_B1S) >= 0, q_positions, placed)
    return _Layout(first, last, there & ~is_first & ~is_last, too_many, part)
