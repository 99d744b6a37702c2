"""H2O: keep the tokens that got most attention so far, and the most recent ones (paper section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .base import METHODS
from .prune_base import GroupReduce, PromptStates, PruneKnobs, PruneMethod, keep_last, over_group


@dataclass(frozen=True)
class H2OKnobs(PruneKnobs):
    """The authors' even split.

    Attributes:
        num_recent: last tokens that always stay; None = half of the budget.
        normalise: divide by the number of tokens that could attend, so that early tokens have no head start.
        group: one score per KV head from its query heads.
    """

    num_recent: int | None = None
    normalise: bool = False
    group: GroupReduce = "mean"


@METHODS.register("h2o")
class H2OMethod(PruneMethod):
    """Score = attention weight summed over all causal queries of the prompt, in float32, accumulated in blocks.

    Pruned once, after the prefill; generated tokens are added and nothing more is evicted.
    """

    name = "h2o"
    paper = "https://arxiv.org/abs/2306.14048"
    summary = "dense prefill, then per KV head the heavy hitters of all attention and the recent tokens"
    index = "attention it got"
    query = "all queries of the prompt"
    budget_split = "recent tokens (half) + heaviest tokens per KV head"
    Knobs = H2OKnobs
    knobs: H2OKnobs

    def check_knobs(self) -> None:
        if self.knobs.num_recent is not None and self.knobs.num_recent < 0:
            raise UserError(f"h2o.num_recent must be at least 0 or None, got {self.knobs.num_recent}.")

    @property
    def num_forced(self) -> int:
        return self.knobs.num_recent or 0

    def scores(self, prompt: PromptStates, num_kept: int) -> Tensor:
        mass = over_group(prompt.mass(), self.knobs.group)
        if self.knobs.normalise:
            mass = mass / torch.arange(prompt.num_tokens, 0, -1, device=mass.device)
        num_recent = num_kept // 2 if self.knobs.num_recent is None else self.knobs.num_recent
        return keep_last(mass[..., : prompt.num_tokens - num_recent], num_recent)
