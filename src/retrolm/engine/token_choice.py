"""Logits to the next token, as transformers' `generate` chooses it in its plain greedy and sampling modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class TokenChoice:
    """How the next token is chosen; nothing here waits for the device.

    Attributes:
        sample: draw from the distribution rather than take its peak.
        temperature, top_k, top_p: as for `generate`; None or a neutral value leaves the distribution as it is.
        eos_ids: ruled out for the first `min_new_tokens` tokens.
        processors: change the logits before a token is chosen, as logits processors that need no ids.
    """

    sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    eos_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    processors: tuple[Any, ...] = ()

    def __call__(self, logits_BV: Tensor, num_done: int) -> Tensor:
        """Token ids int64 [B]; `num_done` tokens were generated before."""
        scores = logits_BV.to(torch.float32, copy=True)
        if num_done < self.min_new_tokens and self.eos_ids:
            scores[:, list(self.eos_ids)] = -torch.inf
        for processor in self.processors:
            scores = processor(None, scores)
        if not self.sample:
            return scores.argmax(-1)
        for warper in self._warpers():
            scores = warper(None, scores)
        probabilities = scores.softmax(-1)
        # `torch.multinomial` of one draw does the same with the same random numbers, but may wait for the device.
        return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(-1)

    def _warpers(self) -> list[Any]:
        found: list[Any] = []
        if self.temperature is not None and self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(top_k=self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            found.append(TopPLogitsWarper(top_p=self.top_p))
        return found
