"""A text's pages attend their sets, all at once and with gradients; what layers share is laid out once.

Pages that see all that is before them are one block of dense causal attention; all others, whose sets are of one size,
are one batch. Shape letters: T tokens, M pages, n pages of one attention call, S slots, W page size, R rotary dims,
H, K, D heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from ..config import RetroConfig
from ..ops.attention import attend, bias_from
from ..ops.page_gather import gather_pages
from ..ops.rotary import rotate
from ..paging import room_for_past
from .backbone import Backbone
from .gather import SetLayout, lay_out
from .layer_call import LayerCall
from .page_pulls import PagePulls
from .placement import sent
from .sparse_pages import SparsePages


@dataclass(frozen=True)
class SetRun:
    """Consecutive pages with sets of one size.

    Attributes:
        rows: which pages. size: pages they attend before themselves. layout: where the tokens of their sets stand.
    """

    rows: slice
    size: int
    layout: SetLayout


@dataclass(frozen=True)
class LayerPlan:
    """What layers of one kind do.

    Attributes:
        sizes: how many pages each page attends before itself. num_dense: tokens of the dense block.
        bias: its additive mask [1, tokens, tokens], or None for plain causal attention.
        runs: all other pages. cos_q, sin_q: RoPE of all queries [T, 1, R].
    """

    sizes: list[int]
    num_dense: int
    bias: Tensor | None
    runs: list[SetRun]
    cos_q: Tensor
    sin_q: Tensor


class SparseSets:
    """The sets of one text in all layers.

    Args:
        detach_pages: keep gradients out of selected pages' keys and values.
        dense_block: take the leading pages, which see everything, as one block.
        pulls: is told what the retriever is to learn from, if it is being trained.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: RetroConfig,
        pages: SparsePages,
        detach_pages: bool,
        dense_block: bool,
        pulls: PagePulls | None = None,
    ) -> None:
        self._backbone, self._config, self._pages = backbone, config, pages
        self._detach, self._dense_block, self._pulls = detach_pages, dense_block, pulls
        self._table = pages.table
        self._bounds = [0, *accumulate(pages.lengths)]
        self._sizes: dict[tuple[object, ...], list[int]] = {}
        self._plans: dict[tuple[object, ...], LayerPlan] = {}
        self._picked: dict[int, list[Tensor]] = {}

    @property
    def num_positions(self) -> int:
        """Positions that normal tokens stand at."""
        lengths, bounds = self._pages.lengths, self._bounds
        kinds = {id(sizes): sizes for sizes in map(self.sizes, range(self._backbone.num_layers))}.values()
        return max(
            min(bounds[page], size * self._pages.page_size) + lengths[page]
            for sizes in kinds
            for page, size in enumerate(sizes)
        )

    def sizes(self, layer: int) -> list[int]:
        """How many pages each page attends before itself."""
        backbone, config = self._backbone, self._config
        window = None if backbone.retrieves(layer) else backbone.layers[layer].window
        attends_all = layer < config.num_skip_layers and config.first_layer_mode == "full"
        if (window, attends_all) not in self._sizes:
            self._sizes[window, attends_all] = self._set_sizes(window, attends_all)
        return self._sizes[window, attends_all]

    def attend(
        self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor, pages: Sequence[Tensor], chosen: Tensor
    ) -> Tensor:
        """Attention of all normal tokens, [T, H, D]; differentiable.

        Args:
            q, k, v: [T, heads, D] before RoPE. pages: keys and values as stored pages [M, W, K, D].
            chosen: ordinals each page attends, int64 [M, S], -1 where a set is smaller.
        """
        plan = self._plan(call.layer)
        if self._pulls is not None:
            self._pulls.keep(call.layer, k, v)
        q = rotate(q, plan.cos_q, plan.sin_q)
        parts = q.split([plan.num_dense, *(self._num_tokens(run) for run in plan.runs)])
        out = [self._attend_dense(call, plan, parts[0], k, v)] if plan.num_dense else []
        picked = self._picked_of(call.layer, plan, chosen)
        for run, part, ids in zip(plan.runs, parts[1:], picked, strict=True):
            out.append(self._attend_run(call, run, part, pages, ids))
        return torch.cat(out)

    def _attend_dense(self, call: LayerCall, plan: LayerPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The leading pages, which attend everything before them: [their tokens, H, D]."""
        num = plan.num_dense
        keys = rotate(k[:num], plan.cos_q[:num], plan.sin_q[:num])
        causal = plan.bias is None
        return attend(q[None], keys[None], v[None, :num], plan.bias, call.scale, call.softcap, causal)[0]

    def _attend_run(self, call: LayerCall, run: SetRun, q: Tensor, pages: Sequence[Tensor], ids: Tensor) -> Tensor:
        """Attention of pages with sets of one size: [their tokens, H, D]."""
        layout, keys, values = run.layout, *pages
        keys, values = gather_pages(keys, values, ids, layout.cos_k, layout.sin_k, layout.span, self._detach)
        q_nQHD = q.unflatten(0, (len(ids), -1))
        causal = layout.bias_nQL is None
        out = attend(q_nQHD, keys, values, layout.bias_nQL, call.scale, call.softcap, causal)
        if self._pulls is not None:
            out = self._pulls.watch(call, run, ids, out, (q_nQHD, keys, values))
        return out.flatten(0, 1)

    def _picked_of(self, layer: int, plan: LayerPlan, chosen: Tensor) -> list[Tensor]:
        """For each run the pages of its sets with their own behind them, int64 [n, S + 1]; the same in every pass."""
        if layer not in self._picked:
            width = chosen.shape[1]
            own = torch.arange(len(chosen), device=chosen.device)[:, None]
            self._picked[layer] = [
                torch.cat([chosen[run.rows, width - run.size :], own[run.rows]], 1) for run in plan.runs
            ]
        return self._picked[layer]

    def _num_tokens(self, run: SetRun) -> int:
        return self._bounds[run.rows.stop] - self._bounds[run.rows.start]

    # --- what layers share --------------------------------------------------------------------------------------

    def _set_sizes(self, window: int | None, attends_all: bool) -> list[int]:
        if window:
            return [self._reached(page, window) for page in range(len(self._pages.lengths))]
        if attends_all:
            return list(range(len(self._pages.lengths)))
        config = self._config
        room = [
            room_for_past(self._table, page, own, config.kv_budget, config.strict_budget)
            for page, own in enumerate(self._pages.lengths)
        ]
        return [min(page, 1 + max(free, 0)) for page, free in enumerate(room)]

    def _reached(self, page: int, window: int) -> int:
        """Pages before `page` that a sliding window of `window` tokens reaches."""
        count, reach = 0, 0
        while count < page and reach < window - 1:
            count += 1
            reach += self._pages.lengths[page - count]
        return count

    def _plan(self, layer: int) -> LayerPlan:
        info, sizes = self._backbone.layers[layer], self.sizes(layer)
        key = (id(sizes), self._backbone.retrieves(layer), info.window, info.layer_type, info.device)
        if key not in self._plans:
            self._plans[key] = self._new_plan(layer, sizes)
        return self._plans[key]

    def _new_plan(self, layer: int, sizes: list[int]) -> LayerPlan:
        info, rope = self._backbone.layers[layer], self._backbone.rope(layer)
        first = self._num_dense(sizes)
        runs = self._runs(layer, sizes, first)
        at_dense = rope.at(torch.arange(self._bounds[first], device=info.device))
        cos = torch.cat([at_dense[0][:, None], *(_by_token(run, run.layout.cos_q) for run in runs)])
        sin = torch.cat([at_dense[1][:, None], *(_by_token(run, run.layout.sin_q) for run in runs)])
        bias = _window_bias(self._bounds[first], info.window, info.device, self._backbone.dtype)
        return LayerPlan(sizes, self._bounds[first], bias, runs, cos, sin)

    def _num_dense(self, sizes: list[int]) -> int:
        """Leading pages that attend everything before them."""
        dense = [page for page, size in enumerate(sizes) if size < page] or [len(sizes)]
        return dense[0] if self._dense_block else 0

    def _runs(self, layer: int, sizes: list[int], first: int) -> list[SetRun]:
        """Pages from `first` on, grouped by the size of their sets, whether the sink is in it, and their own length."""
        kinds = [
            (size, self._has_sink(layer, page, size), self._pages.lengths[page]) for page, size in enumerate(sizes)
        ]
        runs, start = [], first
        for (size, *_), same in groupby(kinds[first:]):
            stop = start + len(list(same))
            runs.append(SetRun(slice(start, stop), size, self._layout(layer, size, start)))
            start = stop
        return runs

    def _has_sink(self, layer: int, page: int, size: int) -> bool:
        """Whether a set of `size` pages before `page` begins with the sink, which may be short."""
        return self._backbone.retrieves(layer) or size == page

    def _layout(self, layer: int, size: int, page: int) -> SetLayout:
        """Positions and mask of a run: one row stands for all, since all pages but the first and last are full."""
        info, table, own = self._backbone.layers[layer], self._table, slice(page, page + 1)
        has_sink = self._has_sink(layer, page, size)
        before = ([0] * bool(size) if has_sink else []) + list(range(page - size + has_sink, page))
        likely_1S = torch.tensor([before[:size]], dtype=torch.int64)
        lengths = table.lengths[likely_1S]
        return lay_out(
            lengths,
            table.starts[likely_1S],
            table.lengths[own, None],
            table.starts[own, None],
            lengths.sum(1),
            self._pages.lengths[page],
            self._pages.page_size,
            self._backbone.rope(layer),
            info.window,
            self._backbone.dtype,
            info.device,
        )


def _by_token(run: SetRun, table_1Q1R: Tensor) -> Tensor:
    """RoPE of the queries of all pages of a run, which stand at the same positions: [tokens, 1, R]."""
    return table_1Q1R.expand(run.rows.stop - run.rows.start, -1, -1, -1).flatten(0, 1)


def _window_bias(num_tokens: int, window: int | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Additive mask [1, T, T] of a sliding window, or None where plain causal attention says it all."""
    if window is None or window >= num_tokens:
        return None
    places = torch.arange(num_tokens, device=device)
    distance = places[:, None] - places
    return bias_from((distance >= 0) & (distance < window), dtype)[None]


def latest_pages(counts: Sequence[int], device: torch.device) -> Tensor:
    """The `counts` pages right before each page, int64 [M, S], -1 at the left."""
    ordinals = torch.arange(len(counts), device=device)[:, None]
    width = max(counts)
    picks = ordinals - torch.arange(width, 0, -1, device=device)
    return picks.where(picks >= ordinals - sent(torch.tensor(counts), device)[:, None], -1)
