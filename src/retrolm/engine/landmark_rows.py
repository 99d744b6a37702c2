"""Where landmarks stand among the tokens of a text: one behind every `num_between` tokens.

Shape letters: B samples, T tokens, S places (tokens and landmarks), C hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def places_of_tokens(num_tokens: int, num_between: int, device: torch.device | None = None) -> Tensor:
    """The place of each token of a text, int64 [T]."""
    at = torch.arange(num_tokens, device=device)
    return at + at // num_between


def num_places(num_tokens: int, num_between: int) -> int:
    """Places that a text takes, landmarks included; the last block's only if it is complete."""
    return num_tokens + num_tokens // num_between


def with_landmarks(rows_BTC: Tensor, landmark_C: Tensor, num_between: int) -> Tensor:
    """Embedded tokens from a text's start on, with a landmark behind each block, [B, S, C]; differentiable."""
    B, T, C = rows_BTC.shape
    whole = T - T % num_between
    blocks = rows_BTC[:, :whole].reshape(B, -1, num_between, C)
    landmarks = landmark_C.to(rows_BTC.dtype).expand(B, blocks.shape[1], 1, C)
    return torch.cat([torch.cat([blocks, landmarks], 2).flatten(1, 2), rows_BTC[:, whole:]], 1)
