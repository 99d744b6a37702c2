"""PyramidKV: SnapKV's scores, more tokens in low layers and fewer in high ones (paper section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from .base import METHODS
from .knobs import positive
from .snapkv import SnapKVKnobs, SnapKVMethod


@dataclass(frozen=True)
class PyramidKVKnobs(SnapKVKnobs):
    """The authors' LongBench settings.

    Attributes:
        observation_window: as SnapKV's. beta: steepness; the last layer chooses 1/beta of the mean choice.
    """

    observation_window: int = 8
    beta: int = 20


@METHODS.register("pyramidkv")
class PyramidKVMethod(SnapKVMethod):
    """The budget is the mean over layers, as in the paper; a single layer may keep up to about twice as much.

    Texts of less than twice the budget are pruned evenly, as by the authors' code, whose layer sizes add up to half a
    token per layer too many where they don't divide; here the low layers give that back.
    """

    name = "pyramidkv"
    paper = "https://arxiv.org/abs/2406.02069"
    summary = "SnapKV with a budget that falls from layer to layer; its mean is the budget"
    query = "last 8 queries of the prompt"
    budget_split = "observation window (8) + best tokens per KV head, more in low layers; the mean is the budget"
    Knobs = PyramidKVKnobs
    knobs: PyramidKVKnobs

    def check_knobs(self) -> None:
        super().check_knobs()
        positive(self.name, self.knobs, "beta")

    def split_budget(self, num_tokens: int, num_layers: int, kv_budget: int) -> list[int]:
        num_window = self.knobs.observation_window
        chosen, choice = kv_budget - num_window, num_tokens - num_window
        if num_tokens < 2 * chosen or num_layers == 1:
            return [kv_budget] * num_layers
        last = chosen // self.knobs.beta
        first = 2 * chosen - last
        if first >= choice:
            first, last = choice, 2 * chosen - choice
        step = (first - last) // (num_layers - 1)
        sizes = [first - layer * step + num_window for layer in range(num_layers)]
        each, more = divmod(sum(sizes) - num_layers * kv_budget, num_layers)
        return [size - each - (layer < more) for layer, size in enumerate(sizes)]
