"""StreamingLLM's set after a dense prefill: the first tokens and the last ones (paper section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from .base import METHODS
from .prune_base import PromptStates, PruneKnobs, PruneMethod


@dataclass(frozen=True)
class StreamingPostfillKnobs(PruneKnobs):
    """The authors' sinks.

    Attributes:
        num_sinks: first tokens that always stay.
        positions: "absolute" leaves kept keys where they were; "compact" closes the gap between sinks and the rest,
            as StreamingLLM's positions inside the cache do.
    """

    num_sinks: int = 4
    positions: Literal["absolute", "compact"] = "absolute"


@METHODS.register("streaming_postfill")
class StreamingPostfillMethod(PruneMethod):
    """Stronger than streaming itself: the keys that stay were computed with all of the prompt in sight."""

    name = "streaming_postfill"
    paper = "https://arxiv.org/abs/2309.17453"
    summary = "dense prefill, then the first 4 tokens and the most recent ones"
    index = "place in the text"
    scope = "all layers"
    budget_split = "4 sinks + recent tokens"
    positions = "true, or compact"
    Knobs = StreamingPostfillKnobs
    knobs: StreamingPostfillKnobs

    def check_knobs(self) -> None:
        if self.knobs.num_sinks < 0:
            raise UserError(f"{self.name}.num_sinks must be at least 0, got {self.knobs.num_sinks}.")

    @property
    def compact_positions(self) -> bool:
        return self.knobs.positions == "compact"

    @property
    def num_forced(self) -> int:
        return self.knobs.num_sinks

    def scores(self, prompt: PromptStates, num_kept: int) -> Tensor:
        places = torch.arange(prompt.num_tokens, device=prompt.k_BKTD.device).float()
        return places.masked_fill(places < self.knobs.num_sinks, torch.inf).expand(*prompt.k_BKTD.shape[:2], -1)
