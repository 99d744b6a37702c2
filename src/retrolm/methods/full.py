"""Full attention: what every method is compared with."""

from __future__ import annotations

from .base import METHODS, Method


@METHODS.register("full")
class FullAttention(Method):
    """The stock model, nothing left out."""

    kind = "dense"
    name = "full"
    paper = "https://arxiv.org/abs/1706.03762"
    summary = "dense attention of the stock model to the whole prompt"
    prefill = "dense"
    budget_split = "no budget: every token attends all before it"
    keeps = "all tokens, on the device"
    positions = "true"
    exact_when = "always"
    has_budget = False
    true_positions = True
