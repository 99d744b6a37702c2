"""A whole text in one differentiable pass: every page over the pages it selects, all pages at once (spec E, stage 2).

The sets, positions and numbers are those of streaming prefill; gradients flow into the keys and values of selected
pages. Bookmark rows run without gradient: behind the normal rows of a stock forward pass, as in prefill, or by
themselves beside those of `text_layers`.
Shape letters: T tokens, M pages, S slots, W page size, H, K, D heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import RetroConfig
from ..methods import PageMethod, PageTensors, choose_pages, page_method
from ..ops.rotary import unscaled
from ..retriever import PageRetriever
from .adapter import LoraAdapter
from .backbone import Backbone
from .bookmark_attention import attend_bookmarks
from .frozen_projections import FrozenProjections
from .layer_call import LayerCall
from .page_pulls import PagePulls
from .placement import sent
from .sparse_pages import SparsePages
from .sparse_sets import SparseSets, latest_pages


class SparseProgram:
    """One pass over one text (a `Program`); run the backward pass inside `Attachment.run` too.

    Args:
        method: scores pages. retriever: None = untrained copies.
        detach_pages: keep gradients out of selected pages' keys and values (less memory, another gradient).
        dense_block: take the leading pages, which see everything, as one block. Off only to test the other path.
        frozen: the projections that bookmark rows use where the model's own are being trained.
        train_retriever: let the backward pass leave what `page_pulls.retriever_gradients` takes.
        adapter: the one at work on the backbone, if any.

    Attributes:
        chosen: layer → ordinals each page attends, int64 [M, S], -1 where a set is smaller; kept for the second run
            of a layer under checkpointing.
        sets: what normal tokens attend. config, retriever, frozen, adapter: as given.
        pulls: what the backward pass leaves for the retriever, or None if that isn't trained.
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
        adapter: LoraAdapter | None = None,
        train_retriever: bool = False,
    ) -> None:
        self._backbone, self.config, self._method = backbone, config, method
        self.frozen, self.retriever, self.adapter, self.pages = frozen, retriever, adapter, pages
        self.num_bookmarks = len(pages.lengths) if method.needs_bookmarks else 0
        self.chosen: dict[int, Tensor] = {}
        layers = [n for n in range(config.num_skip_layers, backbone.num_layers) if backbone.retrieves(n)]
        self.pulls = PagePulls(pages, layers, config.num_local_pages) if train_retriever else None
        self.sets = SparseSets(backbone, config, pages, detach_pages, dense_block, self.pulls)
        self._content: Tensor | None = None
        self._lengths: dict[torch.device, Tensor] = {}
        self._limits: dict[tuple[int, torch.device], tuple[list[int], list[int], tuple[Tensor, Tensor]]] = {}

    @property
    def num_positions(self) -> int:
        """Positions that must be in the RoPE tables."""
        lengths = self.pages.lengths
        return max(self.sets.num_positions, lengths[0] + max(lengths) + 1 if self.num_bookmarks else 0) + 1

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
        if self.frozen is not None:
            out, content = self.frozen.project(layer, name, rows, out.dtype)
        else:
            content = self._backbone.content_keys(layer, rows, out) if name == "k_proj" else None
        if self.retriever is None:
            return out, content
        delta = self.retriever.delta(layer, name, rows).to(out.dtype)
        return out + delta, None if content is None else content + delta

    # --- attention ----------------------------------------------------------------------------------------------

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        rope, call = self._backbone.rope(layer), LayerCall(layer, scale, softcap)
        # Under autocast the stock rotary step leaves queries and keys wider than values.
        q, k = (unscaled(x[0].transpose(0, 1).to(v.dtype), rope.scaling, rope.rotary_dims) for x in (q, k))
        v = v[0].transpose(0, 1)
        T = self.pages.num_tokens
        pages = self.pages.paged(k[:T]), self.pages.paged(v[:T])
        if layer not in self.chosen:
            marks = (q[T:], k[T:]) if self._content is None else (q[T:], self._content[0].reshape(k[T:].shape))
            with torch.no_grad():
                self.choose(layer, q[:T], pages[0], marks, k[T:])
        out = self.sets.attend(call, q[:T], k[:T], v[:T], pages, self.chosen[layer])
        if self.num_bookmarks:
            with torch.no_grad():
                marks_out = self.attend_bookmarks(call, (q[T:], k[T:], v[T:]), pages)
            out = torch.cat([out, marks_out])
        return out[None]

    def attend_bookmarks(
        self, call: LayerCall, marks: tuple[Tensor, Tensor, Tensor], pages: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attention of the bookmarks, [M, H, D]; queries [M, H, D], keys and values [M, K, D], pages [M, W, K, D]."""
        own_k, own_v = (self.pages.left_aligned(x) for x in pages)
        sees_sink = self.config.bookmark_span == "sink_page"
        num_sink = self.pages.lengths[0] if sees_sink else 0
        M = len(self.pages.lengths)
        sink_k, sink_v = (x[:1, :num_sink].expand(M, -1, -1, -1) for x in (own_k, own_v))
        lengths = self._lengths_on(own_k.device)
        is_sink = torch.arange(M, device=own_k.device) == 0
        rope = self._backbone.rope(call.layer)
        return attend_bookmarks(
            *marks, own_k, own_v, lengths, sink_k, sink_v, is_sink, rope, call.scale, call.softcap
        )  # fmt: skip

    # --- which pages --------------------------------------------------------------------------------------------

    def choose(self, layer: int, q: Tensor, keys: Tensor, marks: tuple[Tensor, Tensor], mark_keys: Tensor) -> None:
        """Keep which ordinals [M, S] each page attends before itself, ascending; -1 at the left of smaller sets.

        Args:
            q: of normal tokens [T, H, D]. keys: as stored pages [M, W, K, D].
            marks: bookmarks' queries [M, H, D], and keys [M, K, D] without the constant bias. mark_keys: with it.
        """
        device = keys.device
        counts = self.sets.sizes(layer)
        if not self._backbone.retrieves(layer):
            self.chosen[layer] = latest_pages(counts, device)
            return
        method = self._method_for(layer)
        pages = self._page_tensors(layer, method, q, keys)
        if self.num_bookmarks:
            pages.bookmark_q_NHD, pages.bookmark_k_NKD = marks[0], mark_keys if self.config.score_rope else marks[1]
        probes = method.probe(pages)
        if self.config.causal_selection:
            probes = torch.cat([probes[:1], probes[:-1]])
        scores = method.score(probes, method.digest(pages)).float()
        past, room, there = self._limits_of(counts, device)
        self.chosen[layer] = choose_pages(scores, past, room, 1, self.config.num_local_pages, None, there)

    def _method_for(self, layer: int) -> PageMethod:
        if layer >= self.config.num_skip_layers:
            return self._method
        return page_method("mean_key" if self.config.first_layer_mode == "mean_key" else "recency")()

    def _page_tensors(self, layer: int, method: PageMethod, q: Tensor, keys: Tensor) -> PageTensors:
        ordinals = torch.arange(len(self.pages.lengths), device=q.device)
        queries = q[:0].unflatten(0, (0, self.pages.page_size))
        if method.reads_queries:
            queries = self.pages.left_aligned(self.pages.paged(q))
        pages = PageTensors(layer, queries, self.pages.left_aligned(keys), self._lengths_on(q.device), ordinals)
        if method.needs_rope:
            table, pages.page_size = self._backbone.rope(layer), self.pages.page_size
            table.require(len(ordinals) * pages.page_size + queries.shape[1])
            pages.rope = table.at
        if self.config.score_rope:
            rope = self._backbone.rope(layer)
            rope.require(len(ordinals) * self.pages.page_size)
            pages.page_cos, pages.page_sin = rope.at(ordinals * self.pages.page_size)
        return pages

    def _lengths_on(self, device: torch.device) -> Tensor:
        """Tokens of each page, on a device."""
        if device not in self._lengths:
            self._lengths[device] = sent(torch.tensor(self.pages.lengths), device)
        return self._lengths[device]

    def _limits_of(self, counts: list[int], device: torch.device) -> tuple[list[int], list[int], tuple[Tensor, Tensor]]:
        """Pages before each page, and how many of them besides the sink it may attend, on the host and on a device."""
        key = (id(counts), device)
        if key not in self._limits:
            past = list(range(len(counts)))
            room = [count - min(page, 1) for page, count in enumerate(counts)]
            there = sent(torch.tensor([past, room]), device)
            self._limits[key] = past, room, (there[0], there[1])
        return self._limits[key]
