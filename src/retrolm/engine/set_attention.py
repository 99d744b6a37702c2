"""Normal tokens of a group attend their gathered sets: read pages, rotate keys to compact positions, attend.

Shape letters: n pages of one attention call, S slots, O own slots, L gathered tokens, Q query tokens, W page size,
H, K, D heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..ops.attention import attend, head_major
from ..ops.rotary import rotate
from .captures import LayerSet, QueryCapture
from .chunk import PageGroup
from .dense_block import DenseBlock
from .gather import SetLayout, lay_out
from .group_tensors import GroupTensors
from .head_sets import fold_queries, own_head, write_folded
from .layer_call import LayerCall
from .page_choice import PageSets
from .page_rows import RunRows, TokenRows
from .prefill_parts import PrefillParts
from .set_runs import SetRun, joint_runs, most_pages, set_runs
from .true_distances import left_out, reach, stands_apart


class SetAttention:
    """Attention of one group of a chunk over all layers; what layers share is worked out once.

    Args:
        captures: of each page of a group of questions; none for text.

    Attributes:
        attended: most tokens of each kind of set in layers that choose pages, int64 [] each.
    """

    def __init__(self, parts: PrefillParts, group: PageGroup, captures: Sequence[QueryCapture]) -> None:
        self._parts = parts
        self._group = group
        self._captures = captures
        self._runs: dict[tuple[object, ...], list[SetRun]] = {}
        self._layouts: dict[tuple[object, ...], SetLayout] = {}
        self._blocks: dict[int, DenseBlock] = {}
        self._pages: dict[tuple[object, ...], RunRows] = {}
        self._stands_apart = stands_apart(group, parts.config)
        self._bounds = [0, *accumulate(group.lengths.sum(1).tolist())]
        self.attended: list[Tensor] = []

    def attend(self, call: LayerCall, on: GroupTensors, sets: PageSets, rows: TokenRows) -> None:
        """Fill the output of the group's `rows`."""
        if sets.num_dense:
            self._attend_block(call, on, sets.num_dense, rows)
        if sets.picked_nS is not None:
            self._parts.store.want(call.layer, sets.picked_nS, on.table_ids)
        for run in self._runs_of(call.layer, sets):
            self._attend_run(call, on, sets, run, rows)

    def _attend_block(self, call: LayerCall, on: GroupTensors, num_pages: int, rows: TokenRows) -> None:
        if num_pages not in self._blocks:
            self._blocks[num_pages] = DenseBlock(self._parts, self._group, num_pages)
        block = self._blocks[num_pages]
        block.attend(call, on, TokenRows(*(x[: self._bounds[num_pages]] for x in rows)))
        if self._parts.backbone.retrieves(call.layer):
            self.attended.append(torch.tensor(block.num_tokens))

    def _attend_run(self, call: LayerCall, on: GroupTensors, sets: PageSets, run: SetRun, rows: TokenRows) -> None:
        assert sets.picked_nS is not None
        heads = self._parts.backbone.num_kv_heads if sets.by_head else 1
        picked = sets.picked_nS[run.rows.start * heads : run.rows.stop * heads, sets.picked_nS.shape[1] - run.size :]
        layout = self._layout(call.layer, on, run, picked)
        keys, values = self._gather(call.layer, on, run.rows, picked, layout)
        own = slice(self._bounds[run.rows.start], self._bounds[run.rows.stop])
        pages = self._pages_of(run, keys.device)
        q, out = pages.padded(rows.q_THD[own]), pages.room_for(rows.out_THD[own])
        if sets.by_head:
            keys, values, q = own_head(keys, heads), own_head(values, heads), fold_queries(q, heads)
        q = rotate(q, layout.cos_q, layout.sin_q, out=head_major(q))
        bias = layout.bias_nQL
        found = attend(
            q, keys, values, bias, call.scale, call.softcap, causal=bias is None, out=None if sets.by_head else out
        )
        if sets.by_head:
            write_folded(found, out)
        pages.pack(out, rows.out_THD[own])
        if self._captures:
            for page, kept in _kept(sets, run.rows, keys, values, layout, picked):
                self._captures[page].keep(kept)

    def _pages_of(self, run: SetRun, device: torch.device) -> RunRows:
        """How the rows of a run's pages stand; worked out once for all layers."""
        key = (run.rows.start, run.rows.stop, device)
        if key not in self._pages:
            self._pages[key] = RunRows(self._group.lengths[run.rows].sum(1), device)
        return self._pages[key]

    def _gather(
        self, layer: int, on: GroupTensors, rows: slice, picked_nS: Tensor, layout: SetLayout
    ) -> tuple[Tensor, Tensor]:
        """Keys, rotated to compact positions, and values of [selected | own] pages: [n, L, K, D] each."""
        own_ids = _repeated(on.own_ids[rows], len(picked_nS))
        dtype, cos_sin = self._parts.backbone.dtype, (layout.cos_k, layout.sin_k)
        at_once = self._parts.store.gather_rotated(
            layer, picked_nS, on.table_ids, own_ids, layout.span, *cos_sin, dtype
        )
        if at_once is not None:
            return at_once
        past_ids = on.table_ids[picked_nS.clamp(min=0)].where(picked_nS >= 0, own_ids[:, :1])
        ids = torch.cat([past_ids, own_ids], 1)
        found = self._parts.store.read(layer, ids.flatten())
        keys, values = (x.to(dtype).unflatten(0, (len(ids), -1)).flatten(1, 2)[:, layout.span] for x in found)
        return rotate(keys, *cos_sin, out=head_major(keys)), values

    # --- what layers share ----------------------------------------------------------------------------------

    def _runs_of(self, layer: int, sets: PageSets) -> list[SetRun]:
        backbone = self._parts.backbone
        info, by_choice = backbone.layers[layer], backbone.retrieves(layer)
        key = (by_choice, tuple(sets.sizes), sets.num_dense, info.device)
        if key not in self._runs:
            num_local = self._parts.config.num_local_pages
            most = most_pages(info.device, self._set_bytes(sets))
            if self._group.questions:
                self._runs[key] = joint_runs(self._group, sets.sizes, num_local, by_choice, most)
            else:
                self._runs[key] = set_runs(self._group, sets.sizes, sets.num_dense, num_local, by_choice, most)
        return self._runs[key]

    def _set_bytes(self, sets: PageSets) -> int:
        """Memory that the gathered keys and values of the largest set take, or of a page's sets of all KV heads."""
        backbone = self._parts.backbone
        num_tokens = (max(sets.sizes) + self._group.ids.shape[1]) * self._group.table.page_size
        num_sets = backbone.num_kv_heads if sets.by_head else 1
        return 2 * num_sets * num_tokens * backbone.num_kv_heads * backbone.head_dim * backbone.dtype.itemsize

    def _layout(self, layer: int, on: GroupTensors, run: SetRun, picked_nS: Tensor) -> SetLayout:
        info = self._parts.backbone.layers[layer]
        kind = (info.window, info.layer_type, info.device)
        if run.alike is None or self._stands_apart:
            layout = self._lay_out_chosen(layer, on, run, picked_nS)
        elif kind in run.layouts:
            layout = run.layouts[kind]
        else:
            layout = run.layouts[kind] = self._shared_layout(layer, run, run.alike, kind)
        if self._parts.backbone.retrieves(layer):
            self.attended.append(layout.num_tokens)
        return layout

    def _shared_layout(self, layer: int, run: SetRun, alike_nS: Tensor, kind: tuple[object, ...]) -> SetLayout:
        """One layout for all runs of the same shape."""
        key = (*self._shape(run, alike_nS), *kind)
        if key not in self._layouts:
            self._layouts[key] = self._lay_out_alike(layer, run, alike_nS)
        return self._layouts[key]

    def _shape(self, run: SetRun, alike_nS: Tensor) -> tuple[object, ...]:
        """What two runs must agree in to share a layout."""
        group, table = self._group, self._group.table
        rows = slice(run.rows.start, run.rows.start + len(alike_nS))
        lengths, starts = (tuple(x.flatten().tolist()) for x in _room_of(alike_nS, table.lengths, table.starts))
        own_lengths, own_starts = (tuple(x[rows].flatten().tolist()) for x in (group.lengths, group.own_starts()))
        return lengths, starts, own_lengths, own_starts, tuple(group.end[rows])

    def _lay_out_alike(self, layer: int, run: SetRun, alike_nS: Tensor) -> SetLayout:
        group, table = self._group, self._group.table
        rows = slice(run.rows.start, run.rows.start + len(alike_nS))
        own_starts, ends = group.own_starts()[rows], torch.tensor(group.end[rows])
        past = _room_of(alike_nS, table.lengths, table.starts)
        return self._lay_out(layer, run, *past, group.lengths[rows], own_starts, ends)

    def _lay_out_chosen(self, layer: int, on: GroupTensors, run: SetRun, picked_nS: Tensor) -> SetLayout:
        lengths, starts = _room_of(picked_nS, on.table_lengths, on.table_starts)
        own_lengths, own_starts, ends = (
            _repeated(x[run.rows], len(picked_nS)) for x in (on.own_lengths, on.own_starts, on.ends)
        )
        apart = self._left_out(layer, on, run, picked_nS, lengths) if self._stands_apart else None
        return self._lay_out(layer, run, lengths, starts, own_lengths, own_starts, ends, apart)

    def _left_out(
        self, layer: int, on: GroupTensors, run: SetRun, picked_nS: Tensor, lengths_nS: Tensor
    ) -> Tensor | None:
        """How much further pages stand than side by side, in layers that choose pages and reach far enough."""
        backbone = self._parts.backbone
        most = reach(backbone, layer, self._parts.config.kv_budget)
        if most <= 0 or not backbone.retrieves(layer) or picked_nS.shape[1] == 0:
            return None
        backbone.rope(layer).require(min(most, self._group.table.num_tokens) + 1)
        total_P = on.table_lengths.cumsum(0)
        ends_n = on.ordinals[run.rows] + (on.firsts[run.rows, 0] if len(on.firsts) else 0)
        texts_n = _repeated(total_P[ends_n - 1], len(picked_nS))
        return left_out(picked_nS, lengths_nS, total_P - on.table_lengths, texts_n, most)

    def _lay_out(
        self,
        layer: int,
        run: SetRun,
        lengths_nS: Tensor,
        starts_nS: Tensor,
        own_lengths_nO: Tensor,
        own_starts_nO: Tensor,
        ends_n: Tensor,
        left_out_nS: Tensor | None = None,
    ) -> SetLayout:
        backbone = self._parts.backbone
        info = backbone.layers[layer]
        return lay_out(
            lengths_nS,
            starts_nS,
            own_lengths_nO,
            own_starts_nO,
            ends_n,
            int(self._group.lengths[run.rows].sum(1).max()),
            self._group.table.page_size,
            backbone.rope(layer),
            info.window,
            backbone.dtype,
            info.device,
            left_out_nS,
        )


def _room_of(picked_nS: Tensor, lengths_P: Tensor, starts_P: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in each slot, and where they begin in it; none in empty slots."""
    places = picked_nS.clamp(min=0)
    return lengths_P[places] * (picked_nS >= 0), starts_P[places]


def _repeated(rows: Tensor, num: int) -> Tensor:
    """What belongs to a page, once for each of its sets."""
    return rows if len(rows) == num else rows.repeat_interleave(num // len(rows), 0)


def _kept(
    sets: PageSets, pages: slice, keys: Tensor, values: Tensor, layout: SetLayout, picked: Tensor
) -> Iterator[tuple[int, LayerSet]]:
    """What the questions of a run keep of their sets, or one question of the sets of its KV heads ([K, L, 1, D])."""
    scores = [None] * pages.stop if sets.scores_nP is None else sets.scores_nP
    if sets.by_head:
        own_keys, own_values = (x[:, :, 0].transpose(0, 1) for x in (keys, values))
        yield pages.start, LayerSet(own_keys, own_values, layout.valid_nL.expand(len(keys), -1), picked, scores[0])
        return
    for row, page in enumerate(range(pages.start, pages.stop)):
        alike = min(row, len(layout.valid_nL) - 1)  # one row can stand for all
        held = layout.spans[alike]
        valid = layout.valid_nL[alike, held]
        yield page, LayerSet(keys[row, held], values[row, held], valid, picked[row], scores[page])
