"""Cosines and sines for compact positions, from the model's own rotary module."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError, UserError

_PROBE_POSITIONS = (1, 7, 31, 150)
_PROBE_TOLERANCE = 1e-3


class RopeTable:
    """RoPE of one layer type at positions 0, 1, 2, …, grown as needed.

    RoPE types that switch their frequencies with the length (longrope, dynamic) are held at one set: every call to
    the rotary module also names position `anchor`, which decides the set, and positions past `limit` are refused.

    Args:
        rotary: the model's rotary module. layer_type: its layer type, or None if it knows none.
        anchor: position that decides the frequency set. limit: positions allowed, or None for any.
    """

    def __init__(
        self,
        rotary: nn.Module,
        layer_type: str | None,
        dtype: torch.dtype,
        device: torch.device,
        anchor: int,
        limit: int | None,
    ) -> None:
        self._rotary = rotary
        self._layer_type = layer_type
        self._like = torch.zeros(1, dtype=dtype, device=device)
        self._anchor = anchor
        self._limit = limit
        self._lock = threading.Lock()
        self._cos, self._sin = self._compute(256)
        self.scaling = float(self._cos[0, 0])
        self._probe()

    @property
    def switches(self) -> bool:
        """Whether the module, asked for itself, would switch between frequency sets."""
        return self._anchor > 0 or self._limit is not None

    @property
    def rotary_dims(self) -> int:
        return self._cos.shape[-1]

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cos and sin of all positions that were required so far, [positions, R]."""
        return self._cos, self._sin

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [..., R], at int64 `positions` [...]."""
        positions = positions.to(self._cos.device)
        return self._cos[positions], self._sin[positions]

    def at_signed(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same at positions that can be negative: a rotation the other way round."""
        cos, sin = self.at(positions.abs())
        return cos, torch.where(positions.to(sin.device)[..., None] < 0, -sin, sin)

    @property
    def limit(self) -> int | None:
        """Positions allowed, or None for any."""
        return self._limit

    def require(self, num_positions: int) -> None:
        """Make sure positions below `num_positions` are in the table; raises `UserError` past the limit."""
        if self._limit is not None and num_positions > self._limit:
            raise UserError(
                f"{num_positions} positions are needed but the model's RoPE type allows {self._limit} here. "
                "Use a smaller kv_budget or fewer new tokens."
            )
        with self._lock:
            if num_positions > len(self._cos):
                self._cos, self._sin = self._compute(max(num_positions, 2 * len(self._cos)))

    def _compute(self, num_positions: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        positions = torch.arange(num_positions, device=self._like.device)
        if self._limit is not None:
            positions = positions.clamp(max=self._limit - 1)
        positions = torch.cat([positions, positions.new_tensor([self._anchor])])[None]
        kwargs: dict[str, Any] = {} if self._layer_type is None else {"layer_type": self._layer_type}
        # Not through __call__: hooks that stand on the module answer from this table.
        cos, sin = self._rotary.forward(self._like.to(dtype or self._like.dtype), positions, **kwargs)
        device = self._like.device  # a rotary module with an accelerate hook answers on its own
        return cos[0, :num_positions].to(device).contiguous(), sin[0, :num_positions].to(device).contiguous()

    def _probe(self) -> None:
        """Refuse a rotary module that is not a rotation by an angle proportional to the position."""
        cos, sin = (x.double() for x in self._compute(256, torch.float32))
        cos, sin = cos / cos[0, 0], sin / cos[0, 0]
        ok = torch.allclose(cos[0], torch.ones_like(cos[0])) and not bool(sin[0].any())
        for a in _PROBE_POSITIONS:
            for b in _PROBE_POSITIONS:
                if a + b < min(len(cos), self._limit or len(cos)):
                    ok = ok and torch.allclose(cos[a + b], cos[a] * cos[b] - sin[a] * sin[b], atol=_PROBE_TOLERANCE)
        half = cos.shape[-1] // 2
        if not ok or not torch.equal(cos[:, :half], cos[:, half:]):
            raise UnsupportedModelError(
                "This model's position embedding is not a plain half-split rotation, so stored pages can't be placed "
                "at use. Supported RoPE types: default, linear, llama3, yarn, longrope, dynamic (inside the window)."
            )
