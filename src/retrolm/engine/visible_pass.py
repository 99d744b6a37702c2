"""Whole texts with visible bookmarks in one differentiable pass (D1 a; stage 1 in the paper's literal reading).

Tokens attend the bookmarks of pages before theirs, so gradients flow from page scores through tokens back to
earlier bookmarks; the backbone itself is frozen. Layers are checkpointed: each keeps its input, and runs again
for its gradients.
Shape letters: B sequences, T tokens, N pages, R = T + N rows (see `visible_pages`), M pages but those of the prefix,
H, K heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..config import RetroConfig
from ..ops.attention import shapes_may_vary
from ..ops.rotary import rotate, unscaled
from ..retriever import PageRetriever
from .attachment import Attachment
from .backbone import Backbone
from .bookmark_attention import attend_bookmarks
from .bookmark_stream import BookmarkStates, as_scored, scoring_places
from .page_batch import PageBatch
from .question_attention import masked_attention
from .rope_table import RopeTable
from .text_loss import checkpoint_layers, keep_layers
from .visible_pages import VisiblePages, rows_of


class VisibleProgram:
    """The pass over one batch (a `Program`); a layer may run twice."""

    def __init__(
        self, backbone: Backbone, retriever: PageRetriever | None, batch: PageBatch, config: RetroConfig
    ) -> None:
        self._backbone, self._retriever, self._config = backbone, retriever, config
        self.pages = VisiblePages(batch, config.page_size)
        self.num_bookmarks = self.pages.num_pages
        self.num_own = batch.starts_BM.shape[1]
        self._own_rows = self.pages.own_rows()
        self._places_BM = scoring_places(backbone, batch, config)
        self._allowed: dict[int | None, Tensor] = {}
        self._content: Tensor | None = None
        self.states = BookmarkStates()

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        tokens, marks = out.split([out.shape[1] - self.num_bookmarks, self.num_bookmarks], 1)
        mark_rows = rows[:, -self.num_bookmarks :]
        delta = None if self._retriever is None else self._retriever.delta(layer, name, mark_rows).to(out.dtype)
        if name == "k_proj":
            content = self._backbone.content_keys(layer, mark_rows, marks)
            self._content = content if content is None or delta is None else content + delta
        return None if delta is None else torch.cat([tokens, marks + delta], 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        rope = self._backbone.rope(layer)
        q, k = (unscaled(x, rope.scaling, rope.rotary_dims) for x in (q, k))
        if layer == len(self.states.queries):
            self._keep(rope, q.transpose(1, 2), k.transpose(1, 2))
        tokens = self._attend_tokens(layer, q, k, v, scale, softcap)
        marks = self._attend_marks(rope, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, softcap)
        return torch.cat([tokens.transpose(1, 2), marks], 1)

    def _keep(self, rope: RopeTable, q_BRHD: Tensor, k_BRKD: Tensor) -> None:
        own = slice(self.pages.num_prefix, self.pages.num_prefix + self.num_own)
        queries, keys = (x[:, -self.num_bookmarks :] for x in (q_BRHD, k_BRKD))
        if self._content is not None and self._places_BM is None:
            keys = self._content.reshape(keys.shape)
        queries, keys = as_scored(rope, queries[:, own], keys[:, own], self._places_BM)
        self.states.queries.append(queries)
        self.states.keys.append(keys)

    def _attend_tokens(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Of all tokens over tokens and bookmarks before them, [B, H, T, D]."""
        window = self._backbone.layers[layer].window
        if window not in self._allowed:
            self._allowed[window] = self.pages.allowed(window)[:, None]
        cos, sin = (x[:, None] for x in self._backbone.rope(layer).at(self.pages.positions_BR))
        T = q.shape[2] - self.num_bookmarks
        q, k = rotate(q[:, :, :T], cos[:, :, :T], sin[:, :, :T]), rotate(k, cos, sin)
        return masked_attention(q, k, v, scale, softcap, self._allowed[window])

    def _attend_marks(
        self, rope: RopeTable, q_BRHD: Tensor, k_BRKD: Tensor, v_BRKD: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Of all bookmarks over the sink, their page and themselves (D13), [B, N, H, D]."""
        pages, N = self.pages, self.num_bookmarks
        q, k, v = (x[:, -N:].flatten(0, 1) for x in (q_BRHD, k_BRKD, v_BRKD))
        own_k, own_v = (rows_of(x, self._own_rows).flatten(0, 1) for x in (k_BRKD, v_BRKD))
        sink_rows = pages.sink_rows_BS if self._config.bookmark_span == "sink_page" else pages.sink_rows_BS[:, :0]
        sink_k, sink_v = (rows_of(x, sink_rows).repeat_interleave(N, 0) for x in (k_BRKD, v_BRKD))
        is_sink = pages.is_sink_N.repeat(len(q_BRHD))
        lengths = pages.lengths_BN.flatten()
        found = attend_bookmarks(q, k, v, own_k, own_v, lengths, sink_k, sink_v, is_sink, rope, scale, softcap)
        return found.unflatten(0, (-1, N))


def visible_stream(
    backbone: Backbone,
    attachment: Attachment,
    retriever: PageRetriever | None,
    bookmark: Tensor,
    batch: PageBatch,
    config: RetroConfig,
) -> BookmarkStates:
    """Bookmarks of the text pages and questions of a batch, as `bookmark_stream` gives them; differentiable.

    Args:
        retriever: None = untrained copies. bookmark: embedding [hidden].
        config: `page_size`, `bookmark_span` and `score_rope` are honoured.
    """
    program = VisibleProgram(backbone, retriever, batch, config)
    backbone.require_positions(program.pages.num_rows + 1)
    rows = backbone.embed(batch.tokens_BT)
    marks = bookmark.to(rows.dtype).expand(len(rows), program.num_bookmarks, -1)
    positions = torch.zeros(len(rows), program.pages.num_rows, dtype=torch.int64, device=backbone.device)
    with _running(backbone, attachment, program), _checkpointed(backbone, attachment, program):
        backbone.decoder(inputs_embeds=torch.cat([rows, marks], 1), position_ids=positions, use_cache=False)
    return program.states


@contextmanager
def _checkpointed(backbone: Backbone, attachment: Attachment, program: VisibleProgram) -> Iterator[None]:
    """Checkpoint the layers of what runs in this block, if gradients are wanted; each runs again under `program`."""
    if not torch.is_grad_enabled():
        yield
        return
    checkpoint_layers(backbone.model, lambda: (nullcontext(), _running(backbone, attachment, program)))
    try:
        yield
    finally:
        keep_layers(backbone.model)


@contextmanager
def _running(backbone: Backbone, attachment: Attachment, program: VisibleProgram) -> Iterator[None]:
    """What holds while layers run, the first time and again: another attention kernel would keep other tensors."""
    with attachment.run(program), shapes_may_vary(backbone.device):
        yield
