"""Where landmarks stand among the tokens of a text: one behind every `num_between` tokens.

Shape letters: B samples, T tokens, S places (tokens and landmarks), C hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_places(num_tokens: int, num_between: int) -> int:
    """Places that a text takes, landmarks included; the last block's only if it is complete."""
    return num_tokens + num_tokens // num_between


def places_of_tokens(
    num_tokens: int, num_between: int, num_before: int = 0, device: torch.device | None = None
) -> Tensor:
    """The places of so many tokens behind `num_before` others, counted from the first place behind those, int64 [T]."""
    at = torch.arange(num_before, num_before + num_tokens, device=device)
    return at + at // num_between - num_places(num_before, num_between)


def with_landmarks(rows_BTC: Tensor, landmark_C: Tensor, num_between: int, num_before: int = 0) -> Tensor:
    """Embedded tokens that follow `num_before` others, with a landmark behind each block that they complete.

    Returns:
        [B, S, C]; differentiable.
    """
    B, T, C = rows_BTC.shape
    S = num_places(num_before + T, num_between) - num_places(num_before, num_between)
    landmarks = landmark_C.to(rows_BTC).expand(B, S, C)
    return landmarks.index_copy(1, places_of_tokens(T, num_between, num_before, rows_BTC.device), rows_BTC)
