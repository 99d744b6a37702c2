"""RetroAttention over pages that are retrieved again and again: RetroLM with `retrieve_every`, its last pages revised.

Each time that generated tokens have become a page and retrieve anew, the last `window` - 1 generated pages go through
all layers with it. In every layer they attend the union of the pages that they have seen and those that the newest one
chose, and their keys and values are overwritten. The union is attended at once, at compact positions of its own:
outputs over different sets of pages stand in different position frames, and can't be merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .base import METHODS, PageMethod
from .bookmark import BookmarkMethod
from .knobs import positive
from .retro_exposure import Revises


class RevisesPages(Revises, PageMethod):
    """The decorator, put in front of a page method in a class's bases."""

    paper = "https://arxiv.org/abs/2508.09001"
    when = "each page while reading, every `retrieve_every` tokens, for the generated pages before, too"
    budget_split = "as retrolm; revised pages attend up to `window` budgets, and say so"

    @dataclass(frozen=True)
    class Knobs:
        """window: generated pages that a retrieval computes, the newest included; 1 is the base method."""

        window: int = 2

    def check_knobs(self) -> None:
        super().check_knobs()
        positive(self.name, self.knobs, "window")

    @property
    def num_revised(self) -> int:
        """Generated pages before the newest that are revised with it."""
        return int(self.knobs.window) - 1

    def check_attended(self, attended: Mapping[str, int], num_tokens: int, num_generated: int, allowed: int) -> None:
        """What is generated keeps the budget; the pages that are read again are held to `window` budgets."""
        super().check_attended({**attended, "prefill": 0}, num_tokens, num_generated, allowed)
        super().check_attended({**attended, "decode": 0}, num_tokens, 1, allowed * self.knobs.window)


@METHODS.register("retrolm_retro")
class RetroLMRetro(RevisesPages, BookmarkMethod):
    """RetroAttention over RetroLM."""

    name = "retrolm_retro"
    agreement_layers = 0
    summary = "retrolm with retrieve_every, its last generated pages revised with the pages that later ones choose"
