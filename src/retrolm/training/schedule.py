"""Learning rate by step (D25)."""

from __future__ import annotations

import math


def learning_rate(step: int, num_steps: int, warmup: float, final: float) -> float:
    """Share of the peak rate at a step: linear rise, then cosine decay to `final`."""
    rising = max(1, round(warmup * num_steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, num_steps - rising)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
