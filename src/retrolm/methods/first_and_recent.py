"""Methods by which every token attends the first few tokens and the most recent ones, `kv_budget` in all."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from .sliding_window import recent_places
from .token_base import NewTokens, TokenCache, TokenMethod


class FirstAndRecent(TokenMethod):
    """Base of these methods. Recent tokens stand at true distances, first ones where the method says."""

    index = "place in the text"
    scope = "all layers"
    when = "each token"

    @property
    @abstractmethod
    def num_first(self) -> int:
        """First tokens that always stay."""

    @abstractmethod
    def first_positions(self, true_B: Tensor, kv_budget: int) -> Tensor:
        """Where the first tokens stand to queries that stand at their true positions, int64 [B, num_first]."""

    def keep(self, cache: TokenCache, new: NewTokens, kv_budget: int) -> Tensor:
        return recent_places(cache, new, kv_budget - self.num_first - 1, self.num_first)
