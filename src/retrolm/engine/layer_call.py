"""What the stock layer says when it calls for attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerCall:
    """One layer's attention: its index, the scale of its scores, and the cap on them, if any."""

    layer: int
    scale: float
    softcap: float | None
