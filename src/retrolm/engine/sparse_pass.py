"""A whole text in one differentiable pass: every page over the pages it selects, all pages at once (spec E, stage 2).

The sets, positions and numbers are those of streaming prefill; gradients flow into the keys and values of selected
pages. Bookmark rows ride behind the normal rows, as in prefill, and run without gradient. Pages that see all that is
before them are one block of dense causal attention; all others, whose sets are of one size, are one batch.
Shape letters: T tokens, M pages, n pages of one attention call, S slots, W page size, H, K, D heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import RetroConfig
from ..errors import UserError
from ..methods import PageMethod, PageTensors, choose_pages, page_method
from ..ops.attention import attend, bias_from
from ..ops.page_gather import gather_pages
from ..ops.rotary import rotate, unscaled
from ..paging import PageTable, room_for_past
from ..retriever import PageRetriever
from .backbone import Backbone
from .bookmark_attention import attend_bookmarks
from .frozen_projections import FrozenProjections
from .gather import SetLayout, lay_out


@dataclass(frozen=True)
class SparsePages:
    """How one text is cut: [sink prefix, if any | full pages | last page, maybe short].

    Attributes:
        num_tokens: T. lengths: tokens of each page [M]. page_size: W. pad_left: empty places of the first page.
    """

    num_tokens: int
    lengths: tuple[int, ...]
    page_size: int
    pad_left: int

    @classmethod
    def cut(cls, num_tokens: int, num_prefix: int, page_size: int) -> SparsePages:
        """Cut a text whose first `num_prefix` tokens are a page of their own; raises `UserError` if they are more."""
        if num_prefix > page_size:
            raise UserError(
                f"The prefix takes {num_prefix} tokens, more than one page of {page_size}. Use a larger page_size, or "
                "train without the prefix."
            )
        full, rest = divmod(num_tokens - num_prefix, page_size)
        lengths = [num_prefix] * (num_prefix > 0) + [page_size] * full + [rest] * (rest > 0)
        return cls(num_tokens, tuple(lengths), page_size, page_size - num_prefix if num_prefix else 0)

    @property
    def table(self) -> PageTable:
        return PageTable(torch.arange(len(self.lengths)), torch.tensor(self.lengths), 1, self.page_size)

    def paged(self, x_THD: Tensor) -> Tensor:
        """Tokens as stored pages [M, W, heads, D]: the sink at the right of its room, zeros where no token is."""
        behind = len(self.lengths) * self.page_size - self.pad_left - self.num_tokens
        return F.pad(x_THD, (0, 0, 0, 0, self.pad_left, behind)).unflatten(0, (-1, self.page_size))

    def left_aligned(self, pages_MWHD: Tensor) -> Tensor:
        """The same pages with every page's tokens at the left."""
        if not self.pad_left:
            return pages_MWHD
        return torch.cat([pages_MWHD[:1].roll(-self.pad_left, 1), pages_MWHD[1:]])


@dataclass
class SetRun:
    """Consecutive pages with sets of one size.

    Attributes:
        rows: which pages. picked: ordinals they attend before themselves, int64 [n, S].
    """

    rows: slice
    picked: Tensor


class SparseProgram:
    """One pass over one text (a `Program`); run the backward pass inside `Attachment.run` too.

    Args:
        method: scores pages. retriever: None = untrained copies.
        detach_pages: keep gradients out of selected pages' keys and values (less memory, another gradient).
        dense_block: take the leading pages, which see everything, as one block. Off only to test the other path.
        frozen: the projections that bookmark rows use where the model's own are being trained.

    Attributes:
        chosen: layer → ordinals each page attends, int64 [M, S], -1 where a set is smaller; kept for the second run
            of a layer under checkpointing.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: RetroConfig,
        method: PageMethod,
        retriever: PageRetriever | None,
        pages: SparsePages,
        *,
        detach_pages: bool = False,
        dense_block: bool = True,
        frozen: FrozenProjections | None = None,
    ) -> None:
        self._backbone, self._config, self._method = backbone, config, method
        self._retriever, self._frozen, self.pages = retriever, frozen, pages
        self._detach, self._dense_block = detach_pages, dense_block
        self._table = pages.table
        self.num_bookmarks = len(pages.lengths) if method.needs_bookmarks else 0
        self.chosen: dict[int, Tensor] = {}
        self._content: Tensor | None = None
        self._layouts: dict[tuple[object, ...], SetLayout] = {}
        room = [
            room_for_past(self._table, page, own, config.kv_budget, config.strict_budget)
            for page, own in enumerate(pages.lengths)
        ]
        self._counts = [min(page, 1 + max(free, 0)) for page, free in enumerate(room)]

    @property
    def num_positions(self) -> int:
        """Positions that must be in the RoPE tables."""
        lengths, before = self.pages.lengths, self._table.tokens_before.tolist()
        most = max(
            min(before[page], size * self.pages.page_size) + lengths[page]
            for layer in range(self._backbone.num_layers)
            for page, size in enumerate(self._set_sizes(layer))
        )
        return max(most, lengths[0] + max(lengths) + 1 if self.num_bookmarks else 0) + 1

    # --- projections --------------------------------------------------------------------------------------------

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        if not self.num_bookmarks:
            return None
        normal, marks = out[:, : -self.num_bookmarks], out[:, -self.num_bookmarks :]
        with torch.no_grad():
            found, content = self._bookmark_rows(layer, name, rows[:, -self.num_bookmarks :], marks)
        if name == "k_proj":
            self._content = content
        return None if found is marks else torch.cat([normal, found], 1)

    def _bookmark_rows(self, layer: int, name: str, rows: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """What bookmark rows project to, and for keys the same without the constant bias."""
        if self._frozen is not None:
            out, content = self._frozen.project(layer, name, rows, out.dtype)
        else:
            content = self._backbone.content_keys(layer, rows, out) if name == "k_proj" else None
        if self._retriever is None:
            return out, content
        delta = self._retriever.delta(layer, name, rows).to(out.dtype)
        return out + delta, None if content is None else content + delta

    # --- attention ----------------------------------------------------------------------------------------------

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        rope = self._backbone.rope(layer)
        # Under autocast the stock rotary step leaves queries and keys wider than values.
        q, k = (unscaled(x[0].transpose(0, 1).to(v.dtype), rope.scaling, rope.rotary_dims) for x in (q, k))
        v = v[0].transpose(0, 1)
        T = self.pages.num_tokens
        keys, values = self.pages.paged(k[:T]), self.pages.paged(v[:T])
        if layer not in self.chosen:
            with torch.no_grad():
                self.chosen[layer] = self._choose(layer, q, k, keys)
        out = []
        num_dense = self._num_dense(layer)
        if num_dense:
            out.append(self._dense(layer, q, k, v, num_dense, scale, softcap))
        source = [x.detach() if self._detach else x for x in (keys, values)]
        for run in self._runs(layer, num_dense):
            out.append(self._attend_run(layer, run, q, (keys, values), source, scale, softcap))
        if self.num_bookmarks:
            with torch.no_grad():
                out.append(self._attend_bookmarks(layer, q[T:], k[T:], v[T:], keys, values, scale, softcap))
        return torch.cat(out)[None]

    def _dense(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_pages: int, scale: float, softcap: float | None
    ) -> Tensor:
        """The leading pages, which attend everything before them: [their tokens, H, D]."""
        tokens = sum(self.pages.lengths[:num_pages])
        cos, sin = (x[:, None] for x in self._backbone.rope(layer).at(torch.arange(tokens, device=q.device)))
        q, k = (rotate(x[:tokens], cos, sin)[None] for x in (q, k))
        bias = _window_bias(tokens, self._backbone.layers[layer].window, q)
        return attend(q, k, v[None, :tokens], bias, scale, softcap, causal=bias is None)[0]

    def _attend_run(
        self,
        layer: int,
        run: SetRun,
        q: Tensor,
        pages: tuple[Tensor, Tensor],
        source: Sequence[Tensor],
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention of pages with sets of one size: [their tokens, H, D]."""
        layout = self._layout(layer, run)
        keys, values = (
            torch.cat([gather_pages(past, run.picked), own[run.rows]], 1)[:, layout.span]
            for past, own in zip(source, pages, strict=True)
        )
        keys = rotate(keys, layout.cos_k, layout.sin_k)
        own = self.pages.lengths[run.rows.start]
        first = sum(self.pages.lengths[: run.rows.start])
        q_nQHD = q[first : first + len(keys) * own].unflatten(0, (len(keys), own))
        q_nQHD = rotate(q_nQHD, layout.cos_q, layout.sin_q)
        bias = layout.bias_nQL
        return attend(q_nQHD, keys, values, bias, scale, softcap, causal=bias is None).flatten(0, 1)

    def _attend_bookmarks(
        self,
        layer: int,
        q_MHD: Tensor,
        k_MKD: Tensor,
        v_MKD: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        own_k, own_v = (self.pages.left_aligned(x) for x in (keys, values))
        sees_sink = self._config.bookmark_span == "sink_page"
        num_sink = self.pages.lengths[0] if sees_sink else 0
        M = len(self.pages.lengths)
        sink_k, sink_v = (x[:1, :num_sink].expand(M, -1, -1, -1) for x in (own_k, own_v))
        lengths = torch.tensor(self.pages.lengths, device=q_MHD.device)
        is_sink = torch.arange(M, device=q_MHD.device) == 0
        rope = self._backbone.rope(layer)
        return attend_bookmarks(
            q_MHD, k_MKD, v_MKD, own_k, own_v, lengths, sink_k, sink_v, is_sink, rope, scale, softcap
        )

    # --- which pages --------------------------------------------------------------------------------------------

    def _choose(self, layer: int, q: Tensor, k: Tensor, keys: Tensor) -> Tensor:
        """Ordinals [M, S] that each page attends before itself, ascending; -1 at the left of smaller sets."""
        M, device = len(self.pages.lengths), q.device
        counts = self._set_sizes(layer)
        if not self._backbone.retrieves(layer):
            return _latest(counts, device)
        method = self._method_for(layer)
        pages = self._page_tensors(layer, q, k, keys)
        probes = method.probe(pages)
        if self._config.causal_selection:
            probes = torch.cat([probes[:1], probes[:-1]])
        scores = method.score(probes, method.digest(pages)).float()
        room = [count - min(page, 1) for page, count in enumerate(counts)]
        return choose_pages(scores, list(range(M)), room, 1, self._config.num_local_pages)

    def _method_for(self, layer: int) -> PageMethod:
        if layer >= self._config.num_skip_layers:
            return self._method
        return page_method("mean_key" if self._config.first_layer_mode == "mean_key" else "recency")()

    def _page_tensors(self, layer: int, q: Tensor, k: Tensor, keys: Tensor) -> PageTensors:
        T = self.pages.num_tokens
        ordinals = torch.arange(len(self.pages.lengths), device=q.device)
        lengths = torch.tensor(self.pages.lengths, device=q.device)
        queries = self.pages.left_aligned(self.pages.paged(q[:T]))
        pages = PageTensors(layer, queries, self.pages.left_aligned(keys), lengths, ordinals)
        if self._method.needs_rope:
            table, pages.page_size = self._backbone.rope(layer), self.pages.page_size
            table.require(len(ordinals) * pages.page_size + queries.shape[1])
            pages.rope = table.at
        if self.num_bookmarks:
            pages.bookmark_q_NHD, pages.bookmark_k_NKD = q[T:], k[T:]
            if self._content is not None and not self._config.score_rope:
                pages.bookmark_k_NKD = self._content[0].reshape(k[T:].shape)
        if self._config.score_rope:
            rope = self._backbone.rope(layer)
            rope.require(len(ordinals) * self.pages.page_size)
            pages.page_cos, pages.page_sin = rope.at(ordinals * self.pages.page_size)
        return pages

    def _set_sizes(self, layer: int) -> list[int]:
        """How many pages each page attends before itself."""
        window = self._backbone.layers[layer].window
        if window and not self._backbone.retrieves(layer):
            return [self._reached(page, window) for page in range(len(self.pages.lengths))]
        if layer < self._config.num_skip_layers and self._config.first_layer_mode == "full":
            return list(range(len(self.pages.lengths)))
        return self._counts

    def _reached(self, page: int, window: int) -> int:
        """Pages before `page` that a sliding window of `window` tokens reaches."""
        count, reach = 0, 0
        while count < page and reach < window - 1:
            count += 1
            reach += self.pages.lengths[page - count]
        return count

    # --- runs of alike pages ------------------------------------------------------------------------------------

    def _num_dense(self, layer: int) -> int:
        """Leading pages that attend everything before them."""
        sizes = self._set_sizes(layer)
        dense = [page for page, size in enumerate(sizes) if size < page] or [len(sizes)]
        return dense[0] if self._dense_block else 0

    def _runs(self, layer: int, first: int) -> list[SetRun]:
        """Pages from `first` on, grouped by the size of their sets, whether the sink is in it, and their own length."""
        sizes, chosen = self._set_sizes(layer), self.chosen[layer]
        kinds = [(size, self._has_sink(layer, page, size), self.pages.lengths[page]) for page, size in enumerate(sizes)]
        runs, start = [], first
        for (size, *_), same in groupby(kinds[first:]):
            stop = start + len(list(same))
            runs.append(SetRun(slice(start, stop), chosen[start:stop, chosen.shape[1] - size :]))
            start = stop
        return runs

    def _has_sink(self, layer: int, page: int, size: int) -> bool:
        """Whether a set of `size` pages before `page` begins with the sink, which may be short."""
        return self._backbone.retrieves(layer) or size == page

    def _layout(self, layer: int, run: SetRun) -> SetLayout:
        """Positions and mask of a run: one row stands for all, since all pages but the first and last are full."""
        info, size = self._backbone.layers[layer], run.picked.shape[1]
        first = run.rows.start
        has_sink = self._has_sink(layer, first, size)
        key = (size, first, has_sink, info.window, info.layer_type, info.device)
        if key not in self._layouts:
            before = ([0] * bool(size) if has_sink else []) + list(range(first - size + has_sink, first))
            self._layouts[key] = self._lay_out(layer, torch.tensor([before[:size]], dtype=torch.int64), first)
        return self._layouts[key]

    def _lay_out(self, layer: int, likely_1S: Tensor, page: int) -> SetLayout:
        info, table, own = self._backbone.layers[layer], self._table, slice(page, page + 1)
        lengths = table.lengths[likely_1S]
        return lay_out(
            lengths,
            table.starts[likely_1S],
            table.lengths[own, None],
            table.starts[own, None],
            lengths.sum(1),
            self.pages.lengths[page],
            self.pages.page_size,
            self._backbone.rope(layer),
            info.window,
            self._backbone.dtype,
            info.device,
        )


def _window_bias(num_tokens: int, window: int | None, like: Tensor) -> Tensor | None:
    """Additive mask [1, T, T] of a sliding window, or None where plain causal attention says it all."""
    if window is None or window >= num_tokens:
        return None
    places = torch.arange(num_tokens, device=like.device)
    distance = places[:, None] - places
    return bias_from((distance >= 0) & (distance < window), like.dtype)[None]


def _latest(counts: Sequence[int], device: torch.device) -> Tensor:
    """The `counts` pages right before each page, int64 [M, S], -1 at the left."""
    ordinals = torch.arange(len(counts), device=device)[:, None]
    width = max(counts)
    picks = ordinals - torch.arange(width, 0, -1, device=device)
    return picks.where(picks >= ordinals - torch.tensor(counts, device=device)[:, None], -1)
