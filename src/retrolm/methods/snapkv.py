"""SnapKV: keep what the last tokens of the prompt attend to, in clusters (paper section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ..errors import UserError
from .base import METHODS
from .knobs import positive
from .prune_base import GroupReduce, PromptStates, PruneKnobs, PruneMethod, keep_last, over_group


@dataclass(frozen=True)
class SnapKVKnobs(PruneKnobs):
    """The authors' LongBench settings.

    Attributes:
        observation_window: last tokens of the prompt whose attention counts; they always stay.
        pool: how scores of neighbours are joined, so that clusters stay together. pool_size: neighbours, odd.
        group: one score per KV head from its query heads, taken after pooling.
    """

    observation_window: int = 32
    pool: Literal["max", "avg"] = "max"
    pool_size: int = 7
    group: GroupReduce = "mean"


@METHODS.register("snapkv")
class SnapKVMethod(PruneMethod):
    """Score = attention of the observation window, summed over its rows, pooled over neighbouring tokens.

    The authors expand keys to all query heads and choose for each; here KV heads stay as they are and the scores of a
    group are joined, so that memory is really freed.
    """

    name = "snapkv"
    paper = "https://arxiv.org/abs/2404.14469"
    summary = "dense prefill, then per KV head the tokens that the prompt's last tokens attend to"
    index = "attention it got"
    query = "last 32 queries of the prompt"
    budget_split = "observation window (32) + best tokens per KV head"
    Knobs = SnapKVKnobs
    knobs: SnapKVKnobs

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "observation_window", "pool_size")
        if self.knobs.pool_size % 2 == 0:
            raise UserError(f"{self.name}.pool_size must be odd, got {self.knobs.pool_size}. Use 1 for no pooling.")

    @property
    def num_forced(self) -> int:
        return self.knobs.observation_window

    def scores(self, prompt: PromptStates, num_kept: int) -> Tensor:
        num_window = self.knobs.observation_window
        seen_BKGT = prompt.weights(num_window).sum(3)[..., :-num_window]
        pooled = _pooled(seen_BKGT, self.knobs.pool, self.knobs.pool_size)
        return keep_last(over_group(pooled, self.knobs.group), num_window)


def _pooled(x_BKGT: Tensor, pool: str, size: int) -> Tensor:
    """Mean or maximum over `size` neighbours; the text goes on with zeros, or with nothing, at its ends."""
    flat = x_BKGT.flatten(0, 1)
    pooled = (avg_pool1d if pool == "avg" else max_pool1d)(flat, size, stride=1, padding=size // 2)
    return pooled.view_as(x_BKGT)
