"""Answers of methods that attend the first and the most recent tokens, by the engine's own loop over a `RingCache`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.first_and_recent import FirstAndRecent
from ..ops.paged_attention import PagesToRead, attend_pages
from ..ops.rotary import rotate
from .backbone import Backbone
from .fast_decode import Runner
from .paged_step import paged_step
from .ring_cache import RingCache
from .rope_table import RopeTable


def ring_fits(backbone: Backbone, method: FirstAndRecent, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether answers to these prompts can be decoded over a `RingCache`: it begins with the first tokens."""
    slides = any(info.window is not None for info in backbone.layers)
    return not slides and min(map(len, prompts)) > method.num_first


class RingProgram:
    """Attention of a step's tokens over a `RingCache` (a `Program`); first tokens are turned anew for each step."""

    def __init__(self, backbone: Backbone, cache: RingCache) -> None:
        self._backbone = backbone
        self._cache = cache
        # A captured graph keeps addresses, and the shared tables move when they grow: this program has its own.
        backbone.require_positions(cache.places)
        positions = torch.arange(cache.places, device=backbone.device)
        ropes = {backbone.rope(layer) for layer in range(backbone.num_layers)}
        self._tables = {rope: tuple(x.clone() for x in rope.at(positions)) for rope in ropes}
        self._turns: dict[RopeTable, list[Tensor]] = {}
        self._places_B1, self._newest_B1 = (cache.positions_B[:, None] for _ in range(2))

    def begin_step(self) -> tuple[Tensor, Tensor]:
        cache, true_B = self._cache, self._cache.positions_B
        self._places_B1 = cache.places_of(true_B)[:, None]
        self._newest_B1 = true_B.clamp(max=cache.kv_budget - 1)[:, None]
        first_BF = (cache.method.first_positions(true_B, cache.kv_budget) - cache.base_B[:, None]).clamp(min=0)
        self._turns = {rope: [x[first_BF][:, None] for x in table] for rope, table in self._tables.items()}
        return cache.tokens_B[:, None], (true_B - cache.base_B)[:, None]

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """There are no bookmarks."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        own, num_first = self._cache.layers[layer], self._cache.method.num_first
        for rows, new in ((own.keys, k), (own.values, v)):
            rows.flatten(2, 3).scatter_(2, self._places_B1[:, None, :, None].expand_as(new), new)
        cos, sin = self._turns[self._backbone.rope(layer)]
        rotate(own.first_BKFD[:, :, :num_first], cos, sin, out=own.keys.flatten(2, 3)[:, :, :num_first])
        read = PagesToRead(None)
        out, _ = attend_pages(q, own.keys, own.values, read, self._newest_B1, own.tally, scale, softcap)
        return out.to(q.dtype).transpose(1, 2)


@dataclass(frozen=True)
class RingRunners:
    """Builds runners of one method and budget; two of the same build the same.

    Attributes:
        fused: fused layers wherever the model has them.
    """

    method: FirstAndRecent
    kv_budget: int
    fused: bool = True

    def __call__(self, backbone: Backbone, batch: int, places: int) -> Runner:
        """See `DecodeRequest.runners`."""
        cache = RingCache(backbone, self.method, self.kv_budget, batch, places)
        program = RingProgram(backbone, cache)
        return Runner(backbone, cache, program, paged_step(backbone, cache, program, self.fused))
