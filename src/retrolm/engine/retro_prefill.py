"""Generated pages that are revised with a newer one: each attends what it has seen and what the newer one chooses.

They stand in the newer page's chunk, in front of it, so that every layer stores their new keys and values before
anybody attends. Shape letters: n revised pages of one query, P pages, S slots, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..methods.token_base import places_of
from .chunk import Chunk, PageGroup
from .encoder import Encoder
from .page_choice import PageSets
from .prefill import PrefillProgram
from .set_attention import SetAttention
from .set_runs import SetRun


@dataclass
class RevisedGroup(PageGroup):
    """Generated pages, all of the same length, of the document that `newest` asks.

    Attributes:
        newest: the query page whose choice they get to see, in the same chunk.
        seen_LnP: pages that each has attended so far, bool, on the host; P is that of its last revision.
        union: the same with the newest's choice, bool [n, P] for each layer, on its device; the pass fills it in.
    """

    newest: PageGroup | None = None
    seen_LnP: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0, dtype=torch.bool))
    union: list[Tensor] = field(default_factory=list)


class UnionAttention(SetAttention):
    """Attention over sets of which only the largest size is known beforehand."""

    def _runs_of(self, layer: int, sets: PageSets) -> list[SetRun]:
        if not self._parts.backbone.retrieves(layer):
            return super()._runs_of(layer, sets)
        return [SetRun(slice(0, len(sets.sizes)), max(sets.sizes), None)]


class RetroPrefill(PrefillProgram):
    """The forward pass of newest pages and of those that are revised with them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        groups = self.chunk.groups
        self._sets = [
            UnionAttention(self.parts, group, []) if isinstance(group, RevisedGroup) else own
            for group, own in zip(groups, self._sets, strict=True)
        ]

    def _choose(self, layer: int, groups: list[Any], *rows: Any) -> list[PageSets]:
        found = super()._choose(layer, groups, *rows)
        chosen = {id(group): sets for (_, group, _, _), sets in zip(groups, found, strict=True)}
        return [
            self._union(layer, group, chosen[id(group.newest)], sets) if isinstance(group, RevisedGroup) else sets
            for (_, group, _, _), sets in zip(groups, found, strict=True)
        ]

    def _union(self, layer: int, group: RevisedGroup, newest: PageSets, own: PageSets) -> PageSets:
        device = self.parts.backbone.layers[layer].device
        num_pages = len(group.table)
        seen_nP = group.seen_LnP[layer].to(device, non_blocking=True)
        seen_nP = torch.nn.functional.pad(seen_nP, (0, num_pages - seen_nP.shape[1]))
        if not self.parts.backbone.retrieves(layer):
            group.union.append(seen_nP)
            return own
        assert newest.picked_nS is not None
        # Empty slots are marked behind the last page, and left out.
        picked = newest.picked_nS[:1].where(newest.picked_nS[:1] >= 0, num_pages).clamp(max=num_pages)
        chosen_1P = seen_nP.new_zeros(1, num_pages + 1).scatter_(1, picked, True)[:, :num_pages]
        ordinals = torch.arange(num_pages, device=device)
        past_nP = ordinals < torch.tensor(group.num_past).to(device, non_blocking=True)[:, None]
        union_nP = (seen_nP | chosen_1P) & past_nP
        group.union.append(union_nP)
        size = max(own.sizes)
        return PageSets([size] * len(group), 0, places_of(union_nP[:, None], size)[:, 0])


class RetroEncoder(Encoder):
    """Encodes newest pages with those that are revised; `window` times the budget holds for the latter."""

    def _program(self, chunk: Chunk) -> PrefillProgram:
        return RetroPrefill(self.parts, chunk)

    def _assert_positions(self, chunk: Chunk) -> None:
        super()._assert_positions(Chunk([g for g in chunk.groups if not isinstance(g, RevisedGroup)], chunk.width))
