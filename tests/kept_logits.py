"""A logits processor that keeps what it sees, for tests that compare the logits of ways to generate."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class KeptLogits:
    """Keeps the logits of each step, [B, vocabulary]; it asks for no ids, so the engine's own loop takes it."""

    needs_ids = False

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        self.steps.append(scores.clone())
        return scores
