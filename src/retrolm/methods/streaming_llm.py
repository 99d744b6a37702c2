"""StreamingLLM: attention sinks and a rolling window, at positions inside the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import METHODS
from .first_and_recent import FirstAndRecent
from .knobs import positive
from .token_base import (
    ChunkView,
    Part,
    distance,
    local_part,
    places_of,
    positions_at,
)


@METHODS.register("streaming_llm")
class StreamingLLM(FirstAndRecent):
    """Token t sees the sinks and the tokens after t - (budget - sinks), as if they stood side by side.

    The result is that of feeding one token at a time, whatever the chunk size.
    """

    name = "streaming_llm"
    paper = "https://arxiv.org/abs/2309.17453"
    summary = "first tokens (sinks) and the most recent ones, while reading and answering"
    budget_split = "4 sinks + the rest recent tokens"
    keeps = "sinks and recent tokens, on the device"
    positions = "inside the cache: 0, 1, 2, …"
    exact_when = "kv_budget ≥ prompt and answer"

    @dataclass(frozen=True)
    class Knobs:
        """num_sink: first tokens that always stay."""

        num_sink: int = 4

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "num_sink")

    def check_budget(self, kv_budget: int) -> None:
        self._refuse_budget(kv_budget, self.knobs.num_sink + 1, "sinks and the current token")

    def select(self, view: ChunkView) -> list[Part]:
        window = view.kv_budget - self.knobs.num_sink
        far = view.once(_far_part, view.cache.true_BJT, view.true_BQ, self.knobs.num_sink, view.kv_budget)
        return [local_part(view, window), far]

    @property
    def num_first(self) -> int:
        return self.knobs.num_sink

    def first_positions(self, true_B: Tensor, kv_budget: int) -> Tensor:
        moved_B = (true_B - (kv_budget - 1)).clamp(min=0)
        return torch.arange(self.num_first, device=true_B.device) + moved_B[:, None]


def _far_part(true_BJT: Tensor, true_BQ: Tensor, num_sink: int, kv_budget: int) -> Part:
    """The sinks, for queries that stand at the end of their cache."""
    at = true_BQ.clamp(0, kv_budget - 1)
    return first_tokens_part(true_BJT, true_BQ, num_sink, kv_budget - num_sink, at, at_zero=False)


def first_tokens_part(
    true_BJT: Tensor, true_BQ: Tensor, num_first: int, window: int, q_positions_BQ: Tensor, at_zero: bool
) -> Part:
    """The first tokens, for queries whose local window has left them behind.

    Args:
        q_positions_BQ: where the queries stand for them. at_zero: whether the keys all stand at 0, or at 0, 1, 2, ….
    """
    places = places_of((true_BJT >= 0) & (true_BJT < num_first), num_first)
    true_BJS = positions_at(true_BJT, places)
    k_positions = true_BJS.clamp(0, 0) if at_zero else true_BJS.clamp(min=0)
    return Part(places, distance(true_BQ, true_BJS) >= window, q_positions_BQ, k_positions)
