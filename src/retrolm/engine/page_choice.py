"""Which pages each page of a group attends in a layer (paper eq 6), by the engine's method and within the budget.

How many each attends is known on the host beforehand; which ones, only on the device.
Shape letters: n pages of a group, S slots, P past pages, K KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..methods import PageMethod, PageTensors, choose_pages
from ..methods.head_scores import ScoresHeads
from ..methods.selection import best_last
from .chunk import PageGroup
from .group_tensors import GroupTensors
from .prefill_parts import PrefillParts


@dataclass
class PageSets:
    """The pages that each page of a group attends before itself.

    Attributes:
        sizes: how many. num_dense: leading pages of the group that attend everything before them, as one block.
        picked_nS: ordinals in the group's table, int64, in the order in which they stand (`page_positions`), -1 at the
            left of smaller sets; None if all pages are in the block. [n*K, S] where each KV head has its own set.
        scores_nP: of all past pages, or None where the layer has none of its own; row by row for several questions.
        by_head: each KV head has its own set.
    """

    sizes: list[int]
    num_dense: int
    picked_nS: Tensor | None
    scores_nP: Tensor | Sequence[Tensor | None] | None = None
    by_head: bool = False


class PageChooser:
    """Chooses pages for the groups of one chunk."""

    def __init__(self, parts: PrefillParts) -> None:
        self._parts = parts
        self._sizes: dict[tuple[object, ...], list[int]] = {}
        self._limits: dict[tuple[object, ...], tuple[list[int], list[int], tuple[Tensor, Tensor]]] = {}

    def choose(self, layer: int, group: PageGroup, on: GroupTensors, pages: PageTensors) -> PageSets:
        """Keep the digests of `pages`, and choose for them."""
        sizes = [size for part in group.by_document for size in self._sizes_of(layer, part)]
        if not self._parts.backbone.retrieves(layer):
            return PageSets(sizes, 0, _most_recent(group, sizes).to(on.ordinals.device, non_blocking=True))
        method = self._parts.method_for(layer)
        digests = method.digest(pages)
        self._parts.digests.write(layer, group.ids.flatten(), digests.repeat_interleave(group.ids.shape[1], 0))
        probes = self._shifted(layer, group, method.probe(pages))
        if not group.questions:
            return self._choose_past(layer, group, on, method, probes, sizes)
        apart = [
            self._choose_past(layer, question, its, method, probes[i : i + 1], sizes[i : i + 1])
            for i, (question, its) in enumerate(zip(group.questions, on.questions, strict=True))
        ]
        return _together(apart, on.firsts)

    def _choose_past(
        self, layer: int, group: PageGroup, on: GroupTensors, method: PageMethod, probes: Tensor, sizes: list[int]
    ) -> PageSets:
        """Choose among the past pages of one document."""
        num_dense = self._num_dense(group, sizes)
        num_past = max(group.num_past)
        if num_past == 0 or num_dense == len(group):
            return PageSets(sizes, num_dense, on.ordinals.new_empty(1, 0) if num_past == 0 else None)
        if group.agreed_P is None:
            scores_nKP = self._scores(method, probes, self._parts.digests.read(layer, on.table_ids[:num_past]))
        else:
            scores_nKP = group.agreed_P.to(on.ordinals.device, non_blocking=True)[None, None]
        picked = self._pick(layer, group, on, scores_nKP)
        by_head = scores_nKP.shape[1] > 1
        scores = scores_nKP.sum(1) if by_head else scores_nKP[:, 0]
        return PageSets(sizes, num_dense, picked, scores if self._parts.scores_pages(layer) else None, by_head)

    def _sizes_of(self, layer: int, group: PageGroup) -> list[int]:
        """`set_sizes`, worked out once for layers that agree."""
        backbone = self._parts.backbone
        window = None if backbone.retrieves(layer) else backbone.layers[layer].window
        key = (id(group), window, self._parts.attends_all(layer))
        if key not in self._sizes:
            self._sizes[key] = self.set_sizes(layer, group)
        return self._sizes[key]

    def set_sizes(self, layer: int, group: PageGroup) -> list[int]:
        """How many pages each page of `group` attends before itself."""
        window = self._parts.backbone.layers[layer].window
        if window and not self._parts.backbone.retrieves(layer):
            return [_reached(group.table.lengths, past, window) for past in group.num_past]
        num_sink = group.table.num_sink
        room = self._room(layer, group)
        return [min(past, min(num_sink, past) + max(free, 0)) for past, free in zip(group.num_past, room, strict=True)]

    def _room(self, layer: int, group: PageGroup) -> list[int]:
        """How many pages besides the sinks each page may attend."""
        if self._parts.attends_all(layer):
            return [max(past - group.table.num_sink, 0) for past in group.num_past]
        return group.room

    def _num_dense(self, group: PageGroup, sizes: list[int]) -> int:
        """Leading text pages that leave nothing out, if there are several: one block attends faster than many sets."""
        if group.is_query or not self._parts.config.dense_bypass:
            return 0
        partial = [row for row, past in enumerate(group.num_past) if sizes[row] < past] or [len(group)]
        return partial[0] if partial[0] > 1 else 0

    def _scores(self, method: PageMethod, probes_nF: Tensor, digests_PE: Tensor) -> Tensor:
        """Scores of past pages, float32 [n, K, P], or [n, 1, P] where all heads share them."""
        if self._parts.config.selection_scope == "head" and isinstance(method, ScoresHeads):
            return method.score_heads(probes_nF, digests_PE, self._parts.backbone.num_kv_heads).float()
        return method.score(probes_nF, digests_PE).float()[:, None]

    def _pick(self, layer: int, group: PageGroup, on: GroupTensors, scores_nKP: Tensor) -> Tensor:
        config, (_, heads, num_past) = self._parts.config, scores_nKP.shape
        pinned = None if on.pinned is None else on.pinned[:num_past]
        past, room, there = self._limits_of(layer, group, heads, scores_nKP.device)
        num_sink, num_local = group.table.num_sink, config.num_local_pages
        scores = scores_nKP.flatten(0, 1)
        picked = choose_pages(scores, past, room, num_sink, num_local, pinned, there)
        leaves_out = past[0] - num_sink > room[0]
        if config.page_positions == "ranked_for_questions" and group.is_query and leaves_out:
            return best_last(picked, scores, num_sink, there[0] - num_local, pinned)
        return picked

    def _limits_of(
        self, layer: int, group: PageGroup, heads: int, device: torch.device
    ) -> tuple[list[int], list[int], tuple[Tensor, Tensor]]:
        """Pages before each page and room for them, once per set, on the host and on the device; the same in layers."""
        key = (id(group), heads, self._parts.attends_all(layer), device)
        if key not in self._limits:
            past, room = ([x for x in xs for _ in range(heads)] for xs in (group.num_past, self._room(layer, group)))
            there = [torch.tensor(x).to(device, non_blocking=True) for x in (past, room)]
            self._limits[key] = (past, room, (there[0], there[1]))
        return self._limits[key]

    def _shifted(self, layer: int, group: PageGroup, probes_nF: Tensor) -> Tensor:
        """With causal selection each text page uses the probe of the page before it (D22)."""
        if not self._parts.config.causal_selection or group.is_query:
            return probes_nF
        before = group.last_probe.get(layer, probes_nF[:1])
        group.last_probe[layer] = probes_nF[-1:]
        return torch.cat([before, probes_nF[:-1]])


def _reached(lengths: Tensor, past: int, window: int) -> int:
    """How many of the `past` pages a sliding window of `window` tokens reaches."""
    count, reach = 0, 0
    while count < past and reach < window - 1:
        count += 1
        reach += int(lengths[past - count])
    return count


def _most_recent(group: PageGroup, sizes: list[int]) -> Tensor:
    """The `sizes` pages right before each page, int64 [n, S]."""
    ends = torch.tensor([first + past for first, past in zip(_firsts(group), group.num_past, strict=True)])[:, None]
    picks = ends - torch.arange(max(sizes), 0, -1)
    return picks.where(picks >= ends - torch.tensor(sizes)[:, None], -1)


def _firsts(group: PageGroup) -> list[int]:
    return group.firsts or [0] * len(group)


def _together(apart: list[PageSets], firsts_n1: Tensor) -> PageSets:
    """The sets of several questions, ordinals counted in the joined table."""
    picked = [sets.picked_nS for sets in apart if sets.picked_nS is not None]
    width = max(rows.shape[1] for rows in picked)
    picked_nS = torch.cat([pad(rows, (width - rows.shape[1], 0), value=-1) for rows in picked])
    picked_nS = torch.where(picked_nS >= 0, picked_nS + firsts_n1, picked_nS)
    scores = [None if sets.scores_nP is None else sets.scores_nP[0] for sets in apart]
    return PageSets([sets.sizes[0] for sets in apart], 0, picked_nS, scores)
