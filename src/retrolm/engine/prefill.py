"""Streaming prefill: each page attends its sink, previous and selected pages, in every layer (paper eq 3-6).

All pages of a chunk are encoded in one forward pass, normal rows first, bookmark rows behind. Selection in a layer
depends only on that layer's inputs, so any chunking gives the same numbers (D10).
Shape letters: N pages of a chunk, n pages of one attention call, S slots, Q own tokens, W page size, H, K, D heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from ..config import RetroConfig
from ..methods import PageMethod, PageTensors, choose_pages, page_method
from ..ops.attention import attend
from ..ops.rotary import rotate, unscaled
from ..paging import PageTable
from ..retriever import PageRetriever
from ..store import DigestIndex, PageStore
from .backbone import Backbone
from .bookmark_attention import attend_bookmarks
from .chunk import Chunk, PageGroup
from .gather import SetLayout, lay_out


@dataclass
class LayerChoice:
    """What a query page attended in one layer.

    Attributes:
        ordinals: selected pages, int64 [S], ascending. scores: float32 [P] over all past pages, or None where the
            layer has no scores of its own. attended_tokens: gathered and own tokens.
    """

    ordinals: Tensor
    scores: Tensor | None
    attended_tokens: int


@dataclass
class QueryCapture:
    """A query page's keys and values by layer, ready for decoding.

    Attributes:
        end: compact position that follows the query's last token.
        keys: rotated, [L, K, D] per layer. values: [L, K, D] per layer.
    """

    end: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    choices: list[LayerChoice] = field(default_factory=list)


@dataclass
class PrefillParts:
    """What prefill works with; shared by all chunks of an engine."""

    backbone: Backbone
    config: RetroConfig
    retriever: PageRetriever | None
    method: PageMethod
    store: PageStore
    digests: DigestIndex

    def method_for(self, layer: int) -> PageMethod:
        """The first layers' bookmarks tie, so they choose by recency or by mean keys (D7)."""
        if layer >= self.config.num_skip_layers:
            return self.method
        return page_method("mean_key" if self.config.first_layer_mode == "mean_key" else "recency")()

    def scores_pages(self, layer: int) -> bool:
        """Whether a layer's choice rests on scores, not just on recency."""
        return layer >= self.config.num_skip_layers or self.config.first_layer_mode == "mean_key"

    def room(self, layer: int, group: PageGroup) -> list[int]:
        """How many pages besides the sinks each page of `group` may attend in a layer."""
        if layer < self.config.num_skip_layers and self.config.first_layer_mode == "full":
            return [max(past - group.table.num_sink, 0) for past in group.num_past]
        return group.room


class PrefillProgram:
    """The forward pass of one chunk (a `Program` for `Attachment.run`)."""

    def __init__(self, parts: PrefillParts, chunk: Chunk) -> None:
        self.parts = parts
        self.chunk = chunk
        self.num_bookmarks = chunk.num_pages if parts.method.needs_bookmarks else 0
        self.captures = [QueryCapture(g.end[0] + len(g.tokens[0])) if g.is_query else None for g in chunk.groups]
        self.peak_attended = 0
        self._lengths = chunk.page_lengths()
        self._content: Tensor | None = None
        self._layouts: dict[tuple[object, ...], SetLayout] = {}

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        if not self.num_bookmarks:
            return None
        marks = slice(-self.num_bookmarks, None)
        if name == "k_proj":
            self._content = self.parts.backbone.content_keys(layer, rows[:, marks], out[:, marks])
        if self.parts.retriever is None:
            return None
        delta = self.parts.retriever.delta(layer, name, rows[:, marks]).to(out.dtype)
        out[:, marks] += delta
        if name == "k_proj" and self._content is not None:
            self._content = self._content + delta
        return out

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        rope = self.parts.backbone.rope(layer)
        q, k = (unscaled(x[0].transpose(0, 1), rope.scaling, rope.rotary_dims) for x in (q, k))
        v = v[0].transpose(0, 1)
        N, Q = self.chunk.num_pages, self.chunk.width
        q_NQHD, k_NQKD, v_NQKD = (x[: N * Q].unflatten(0, (N, Q)) for x in (q, k, v))
        marks = (q[N * Q :], k[N * Q :], v[N * Q :]) if self.num_bookmarks else None
        pages = self._page_tensors(layer, q_NQHD, k_NQKD, marks)
        self._store_pages(layer, k_NQKD, v_NQKD)
        out = torch.zeros_like(q_NQHD)
        out_marks = []
        for index, (group, where) in enumerate(self.chunk.slices()):
            chosen, scores = self._choose(layer, group, _take(pages, where))
            self._attend_group(layer, index, group, q_NQHD[where], chosen, scores, out[where], scale, softcap)
            if marks is not None:
                own = tuple(x[where] for x in marks)
                out_marks.append(
                    self._attend_bookmarks(layer, group, own, k_NQKD[where], v_NQKD[where], scale, softcap)
                )
        rows = [out.flatten(0, 1), *out_marks]
        return torch.cat(rows)[None]

    # --- pages into the store -------------------------------------------------------------------------------

    def _page_tensors(
        self, layer: int, q_NQHD: Tensor, k_NQKD: Tensor, marks: tuple[Tensor, ...] | None
    ) -> PageTensors:
        device = q_NQHD.device
        ordinals = torch.tensor([n for group in self.chunk.groups for n in group.num_past], device=device)
        pages = PageTensors(layer, q_NQHD, k_NQKD, self._lengths.to(device), ordinals)
        if marks is not None:
            pages.bookmark_q_NHD, pages.bookmark_k_NKD = marks[0], marks[1]
            if self._content is not None and not self.parts.config.score_rope:
                pages.bookmark_k_NKD = self._content[0].reshape(marks[1].shape)
        if self.parts.config.score_rope:
            rope = self.parts.backbone.rope(layer)
            starts = ordinals * self.parts.config.page_size
            rope.require(int(starts.max()) + 1)
            pages.page_cos, pages.page_sin = rope.at(starts)
        return pages

    def _store_pages(self, layer: int, k_NQKD: Tensor, v_NQKD: Tensor) -> None:
        for group, where in self.chunk.slices():
            keys, values = (_records(group, x[where]) for x in (k_NQKD, v_NQKD))
            self.parts.store.write(layer, group.ids.flatten(), keys, values)

    # --- which pages ----------------------------------------------------------------------------------------

    def _choose(self, layer: int, group: PageGroup, pages: PageTensors) -> tuple[Tensor, Tensor | None]:
        """Ordinals [n, S] that each page of the group attends (-1 = none, at the left), and the scores [n, P]."""
        window = self.parts.backbone.layers[layer].window
        if window and not self.parts.backbone.retrieves(layer):
            return _most_recent(group, window).to(pages.lengths.device), None
        method = self.parts.method_for(layer)
        digests = method.digest(pages)
        self.parts.digests.write(layer, group.ids.flatten(), digests.repeat_interleave(group.ids.shape[1], 0))
        num_past = max(group.num_past)
        if num_past == 0:
            return pages.lengths.new_empty(len(group), 0), None
        probes = self._shifted(layer, group, method.probe(pages))
        scores = method.score(probes, self.parts.digests.read(layer, group.table.ids[:num_past])).float()
        pinned = None
        if group.pinned:
            pinned = torch.zeros(num_past, dtype=torch.bool, device=scores.device)
            pinned[list(group.pinned)] = True
        config = self.parts.config
        room = self.parts.room(layer, group)
        chosen = choose_pages(scores, group.num_past, room, group.table.num_sink, config.num_local_pages, pinned)
        if layer + 1 < self.parts.backbone.num_layers:
            self.parts.store.prefetch(layer + 1, group.table.ids.to(chosen.device)[chosen[-1].clamp(min=0)])
        return chosen, scores if self.parts.scores_pages(layer) else None

    def _shifted(self, layer: int, group: PageGroup, probes_nF: Tensor) -> Tensor:
        """With causal selection each text page uses the probe of the page before it (D22)."""
        if not self.parts.config.causal_selection or group.is_query:
            return probes_nF
        before = group.last_probe.get(layer, probes_nF[:1])
        group.last_probe[layer] = probes_nF[-1:]
        return torch.cat([before, probes_nF[:-1]])

    # --- attention ------------------------------------------------------------------------------------------

    def _attend_group(
        self,
        layer: int,
        index: int,
        group: PageGroup,
        q_nQHD: Tensor,
        chosen: Tensor,
        scores: Tensor | None,
        out: Tensor,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Attention of a group's normal tokens, alike pages together; fills `out` [n, Q, H, D]."""
        for rows, count in self._alike(layer, group, chosen):
            picked = chosen[rows, chosen.shape[1] - count :]
            k_nLKD, v_nLKD, layout = self._gather(layer, group, rows, picked)
            tokens = int(group.lengths[rows].sum(1).max())
            q = rotate(q_nQHD[rows, :tokens], layout.cos_q, layout.sin_q)
            bias = layout.bias_nQL
            out[rows, :tokens] = attend(q, k_nLKD, v_nLKD, bias, scale, softcap, causal=bias is None)
            self._account(layer, layout)
            capture = self.captures[index]
            if capture is not None:
                self._keep(capture, k_nLKD, v_nLKD, layout, picked, scores)

    def _alike(self, layer: int, group: PageGroup, chosen: Tensor) -> list[tuple[slice, int]]:
        """Runs of pages with sets of one size and equal own lengths: (rows, selected pages), within memory."""
        sliding = not self.parts.backbone.retrieves(layer)
        counts = [
            int((chosen[i] >= 0).sum()) if sliding else min(past, min(group.table.num_sink, past) + max(room, 0))
            for i, (past, room) in enumerate(zip(group.num_past, self.parts.room(layer, group), strict=True))
        ]
        keys = [(count, int(own), end) for count, own, end in zip(counts, group.lengths.sum(1), group.end, strict=True)]
        # A CPU works fastest on one page's set at a time, which fits its caches; a GPU on many.
        most = 1 if chosen.device.type == "cpu" else 64
        runs, start = [], 0
        for key, same in groupby(keys):
            stop = start + len(list(same))
            runs += [(slice(at, min(at + most, stop)), key[0]) for at in range(start, stop, most)]
            start = stop
        return runs

    def _gather(self, layer: int, group: PageGroup, rows: slice, picked: Tensor) -> tuple[Tensor, Tensor, SetLayout]:
        """Keys, rotated to compact positions, and values of [selected | own] pages: [n, L, K, D] each."""
        device = picked.device
        own_ids = group.ids[rows].to(device)
        past_ids = group.table.ids.to(device)[picked.clamp(min=0)].where(picked >= 0, own_ids[:, :1])
        ids = torch.cat([past_ids, own_ids], 1)
        keys, values = self.parts.store.read(layer, ids.flatten())
        layout = self._layout(layer, group, rows, picked)
        n = len(ids)
        dtype = self.parts.backbone.dtype
        keys, values = (x.to(dtype).unflatten(0, (n, -1)).flatten(1, 2)[:, layout.span] for x in (keys, values))
        return rotate(keys, layout.cos_k, layout.sin_k), values, layout

    def _layout(self, layer: int, group: PageGroup, rows: slice, picked: Tensor) -> SetLayout:
        info, table = self.parts.backbone.layers[layer], group.table
        count = picked.shape[1]
        first = rows.start
        all_alike = _full_between(table, group.num_past[first]) or count == group.num_past[first]
        if self.parts.backbone.retrieves(layer) and all_alike:
            same = (count, int(group.lengths[first].sum()), group.end[first], id(table))
            key = (*same, info.window, info.layer_type, info.device)
            if key not in self._layouts:
                sinks = torch.arange(min(table.num_sink, count))
                others = torch.arange(group.num_past[first] - (count - len(sinks)), group.num_past[first])
                likely = torch.cat([sinks, others])[None]
                self._layouts[key] = self._lay_out(layer, group, slice(first, first + 1), likely)
            return self._layouts[key]
        return self._lay_out(layer, group, rows, picked.cpu())

    def _lay_out(self, layer: int, group: PageGroup, rows: slice, picked_nS: Tensor) -> SetLayout:
        info, table, config = self.parts.backbone.layers[layer], group.table, self.parts.config
        there = picked_nS >= 0
        lengths = table.lengths[picked_nS.clamp(min=0)].where(there, torch.zeros(()).long())
        starts = table.starts[picked_nS.clamp(min=0)]
        own = group.lengths[rows]
        return lay_out(
            lengths,
            starts,
            own,
            group.own_starts()[rows],
            torch.tensor(group.end[rows]),
            int(own.sum(1).max()),
            config.page_size,
            self.parts.backbone.rope(layer),
            info.window,
            self.parts.backbone.dtype,
            info.device,
        )

    def _attend_bookmarks(
        self,
        layer: int,
        group: PageGroup,
        marks: tuple[Tensor, ...],
        k_nQKD: Tensor,
        v_nQKD: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """The bookmarks of a group: sink, own page, itself (D13)."""
        q_nHD, mark_k, mark_v = marks
        device = q_nHD.device
        sink_k, sink_v = self._sink(layer, group, k_nQKD)
        return attend_bookmarks(
            q_nHD,
            mark_k,
            mark_v,
            k_nQKD,
            v_nQKD,
            group.lengths.sum(1).to(device),
            sink_k,
            sink_v,
            torch.tensor([past < group.table.num_sink for past in group.num_past], device=device),
            self.parts.backbone.rope(layer),
            scale,
            softcap,
        )

    def _sink(self, layer: int, group: PageGroup, k_nQKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the sink pages' tokens, [n, tokens, K, D]."""
        table = group.table
        num_sink = table.num_sink if self.parts.config.bookmark_span == "sink_page" else 0
        if num_sink == 0 or len(table) < num_sink:
            empty = k_nQKD[:, :0]
            return empty, empty
        keys, values = self.parts.store.read(layer, table.ids[:num_sink].to(k_nQKD.device))
        keys, values = (
            torch.cat([x[i, -int(length) :] for i, length in enumerate(table.lengths[:num_sink])]).to(k_nQKD.dtype)
            for x in (keys, values)
        )
        return keys.expand(len(group), -1, -1, -1), values.expand(len(group), -1, -1, -1)

    # --- accounts -------------------------------------------------------------------------------------------

    def _account(self, layer: int, layout: SetLayout) -> None:
        if self.parts.backbone.retrieves(layer):
            self.peak_attended = max(self.peak_attended, layout.num_tokens)

    def _keep(
        self,
        capture: QueryCapture,
        k_nLKD: Tensor,
        v_nLKD: Tensor,
        layout: SetLayout,
        picked: Tensor,
        scores: Tensor | None,
    ) -> None:
        valid = layout.valid_nL[0]
        capture.keys.append(k_nLKD[0, valid])
        capture.values.append(v_nLKD[0, valid])
        ordinals = picked[0][picked[0] >= 0].cpu()
        capture.choices.append(LayerChoice(ordinals, None if scores is None else scores[0].cpu(), layout.num_tokens))


def _take(pages: PageTensors, where: slice) -> PageTensors:
    """The rows of one group."""

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[where]

    return PageTensors(
        pages.layer,
        pages.q_NWHD[where],
        pages.k_NWKD[where],
        pages.lengths[where],
        pages.ordinals[where],
        cut(pages.bookmark_q_NHD),
        cut(pages.bookmark_k_NKD),
        cut(pages.page_cos),
        cut(pages.page_sin),
    )


def _records(group: PageGroup, x_nQKD: Tensor) -> Tensor:
    """Lay tokens out as stored pages [n*O, W, K, D]: sink pages at the right of their room, zeros elsewhere."""
    size = group.table.page_size
    slots = group.ids.shape[1]
    if slots == 1 and x_nQKD.shape[1] == size and bool((group.lengths == size).all()):
        return x_nQKD
    n, _, K, D = x_nQKD.shape
    records = x_nQKD.new_zeros(n, slots * size, K, D)
    starts = group.own_starts()[:, 0].tolist()
    for row, (start, length) in enumerate(zip(starts, group.lengths.sum(1).tolist(), strict=True)):
        records[row, start : start + length] = x_nQKD[row, :length]
    return records.reshape(n * slots, size, K, D)


def _most_recent(group: PageGroup, window: int) -> Tensor:
    """Ordinals [n, S] of the pages that a sliding window of `window` tokens can reach from each page."""
    picks = []
    for past in group.num_past:
        first, reach = past, 0
        while first > 0 and reach < window - 1:
            first -= 1
            reach += int(group.table.lengths[first])
        picks.append(list(range(first, past)))
    width = max(len(pick) for pick in picks)
    return torch.tensor([[-1] * (width - len(pick)) + pick for pick in picks], dtype=torch.int64).reshape(
        len(picks), width
    )


def _full_between(table: PageTable, num_past: int) -> bool:
    """Whether all pages between the sinks and page `num_past` are full, so that every choice has the same shape."""
    return bool((table.lengths[table.num_sink : num_past] == table.page_size).all())
