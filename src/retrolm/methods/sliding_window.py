"""The sliding window of a model's own layers: what layers that don't choose attend. Not a method to pick."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .token_base import ChunkView, NewTokens, Part, TokenCache, TokenMethod, local_part, places_of


class SlidingWindow(TokenMethod):
    """The most recent tokens, whatever the budget."""

    name = "sliding window"
    paper = "https://arxiv.org/abs/2310.06825"
    summary = "a model's own sliding layers"
    budget_split = "none"
    keeps = "the window's tokens"
    positions = "true"
    exact_when = "always"

    @dataclass(frozen=True)
    class Knobs:
        """window: tokens, the current one included."""

        window: int = 1

    def select(self, view: ChunkView) -> list[Part]:
        return [local_part(view, self.knobs.window)]

    def keep(self, cache: TokenCache, new: NewTokens, kv_budget: int) -> Tensor:
        return recent_places(cache, new, self.knobs.window - 1, num_first=0)


def recent_places(cache: TokenCache, new: NewTokens, num_recent: int, num_first: int) -> Tensor:
    """Places of the first and the most recent tokens of each sample."""
    found: Tensor = new.once(_recent_places, cache.true_BJT, new.starts, num_recent, num_first)
    return found


def _recent_places(true_BJT: Tensor, starts_B: Tensor, num_recent: int, num_first: int) -> Tensor:
    recent = true_BJT >= starts_B[:, None, None] - num_recent
    return places_of((true_BJT >= 0) & ((true_BJT < num_first) | recent), num_first + num_recent)
