"""LM-Infinite: a Λ-shaped mask, and a limit on how far away the first tokens look."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import METHODS
from .first_and_recent import FirstAndRecent
from .knobs import positive
from .streaming_llm import first_tokens_part
from .token_base import ChunkView, Part, local_part


@METHODS.register("lm_infinite")
class LMInfinite(FirstAndRecent):
    """Tokens of the local window at true distances; the first tokens, once outside it, all at the window's size."""

    name = "lm_infinite"
    paper = "https://arxiv.org/abs/2308.16137"
    summary = "first tokens at a limited distance and the most recent ones (Λ mask)"
    budget_split = "10 first tokens + the rest local tokens"
    keeps = "first and local tokens, on the device"
    positions = "true distances in the window; first tokens behind it at the window's size"
    exact_when = "kv_budget - num_global ≥ prompt and answer"

    @dataclass(frozen=True)
    class Knobs:
        """num_global: first tokens that always stay."""

        num_global: int = 10

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "num_global")

    def check_budget(self, kv_budget: int) -> None:
        self._refuse_budget(kv_budget, self.knobs.num_global + 1, "the first tokens and the current one")

    def select(self, view: ChunkView) -> list[Part]:
        window = view.kv_budget - self.knobs.num_global
        far = view.once(_far_part, view.cache.true_BJT, view.true_BQ, self.knobs.num_global, window)
        return [local_part(view, window), far]

    @property
    def num_first(self) -> int:
        return self.knobs.num_global

    def first_positions(self, true_B: Tensor, kv_budget: int) -> Tensor:
        at_limit_B = true_B - (kv_budget - self.num_first)
        return torch.arange(self.num_first, device=true_B.device).maximum(at_limit_B[:, None])


def _far_part(true_BJT: Tensor, true_BQ: Tensor, num_global: int, window: int) -> Part:
    """The first tokens at the window's size."""
    return first_tokens_part(true_BJT, true_BQ, num_global, window, true_BQ.clamp(0, 0) + window, at_zero=True)
