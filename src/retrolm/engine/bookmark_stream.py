"""The bookmark stream: one token per page through the stock layers, over captured keys and values (spec E, stage 1).

Since bookmarks are invisible to normal tokens, this small pass is all that training differentiates.
Shape letters: L layers, B sequences, M pages with the query pages last, Q query pages, P text pages, H, K heads, D head
dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import RetroConfig
from ..ops.attention import shapes_may_vary
from ..ops.rotary import rotate, unscaled
from ..retriever import PageRetriever
from .attachment import Attachment, PassIsOver
from .backbone import Backbone
from .bookmark_sets import BookmarkSets
from .dense_pass import DenseStates
from .frozen_projections import FrozenProjections
from .page_batch import PageBatch
from .prefill_layers import can_fuse
from .rope_table import RopeTable
from .stream_layers import stream_rows


@dataclass
class BookmarkStates:
    """Bookmark queries and keys by layer, as they are scored: [B, M, H, D] and [B, M, K, D].

    They are before RoPE and without the constant key bias; under `score_rope` (D3) rotated to their page's true place
    and with it.
    """

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)


class BookmarkProgram:
    """Forward pass of bookmark rows alone (a `Program`); differentiable in the retriever."""

    def __init__(
        self,
        backbone: Backbone,
        retriever: PageRetriever | None,
        batch: PageBatch,
        dense: DenseStates,
        config: RetroConfig,
        frozen: FrozenProjections | None = None,
    ) -> None:
        self._backbone, self._frozen = backbone, frozen
        self._places_BM = scoring_places(backbone, batch, config)
        self._retriever = retriever
        self._dense = dense
        num_sink = _num_sink(batch) if config.bookmark_span == "sink_page" else 0
        self._sets = BookmarkSets(batch, num_sink, backbone.dtype)
        self._content: Tensor | None = None
        self._projected: dict[str, Tensor] = {}
        self.num_bookmarks = batch.lengths_BM.shape[1]
        self.states = BookmarkStates()

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        changed = self._changed(layer, name, rows, out)
        self._projected[name] = out if changed is None else changed
        return changed

    def _changed(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        delta = None if self._retriever is None else self._retriever.delta(layer, name, rows).to(out.dtype)
        content, found = None, out
        if self._frozen is not None:
            found, content = self._frozen.project(layer, name, rows, out.dtype)
        elif name == "k_proj":
            content = self._backbone.content_keys(layer, rows, out)
        if name == "k_proj":
            self._content = content if content is None or delta is None else content + delta
        if delta is not None:
            found = found + delta
        return None if found is out else found

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        rope = self._backbone.rope(layer)
        if rope.scaling == 1.0 and self._backbone.layers[layer].rotates_projections:
            q, k = (self._before_rope(name, like) for name, like in (("q_proj", q), ("k_proj", k)))
        self._keep(rope, *(unscaled(x, rope.scaling, rope.rotary_dims).transpose(1, 2) for x in (q, k)))
        if layer == self._backbone.num_layers - 1:
            raise PassIsOver
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        shape = q.shape[:2]
        marks = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        keys, values = self._dense.keys[layer], self._dense.values[layer]
        return self._sets.attend(marks, keys, values, rope, scale, softcap).unflatten(0, shape)

    def _before_rope(self, name: str, like_BHMD: Tensor) -> Tensor:
        """The same numbers as the stock layer's, which were turned by nothing at position 0, with less to go back."""
        return self._projected[name].unflatten(-1, (-1, like_BHMD.shape[-1])).transpose(1, 2)

    def _keep(self, rope: RopeTable, q_BMHD: Tensor, k_BMKD: Tensor) -> None:
        """Add a layer's queries and keys, as they are scored, to the states."""
        if self._places_BM is None and self._content is not None:
            k_BMKD = self._content.reshape(k_BMKD.shape)
        q_BMHD, k_BMKD = as_scored(rope, q_BMHD, k_BMKD, self._places_BM)
        self.states.queries.append(q_BMHD)
        self.states.keys.append(k_BMKD)


def _num_sink(batch: PageBatch) -> int:
    """Tokens of the sink: the prefix or, as in prefill, the first text page."""
    num_sink = batch.num_prefix or batch.sizes.first
    if num_sink is None:
        raise ValueError("first pages of unequal length can't be the sinks of one batch; give a prefix")
    return num_sink


def as_scored(rope: RopeTable, q_BMHD: Tensor, k_BMKD: Tensor, places_BM: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and keys turned to the true places of their pages, where scores are to depend on these (D3)."""
    if places_BM is None:
        return q_BMHD, k_BMKD
    cos, sin = (table[:, :, None] for table in rope.at(places_BM))
    return rotate(q_BMHD, cos, sin), rotate(k_BMKD, cos, sin)


def scoring_places(backbone: Backbone, batch: PageBatch, config: RetroConfig) -> Tensor | None:
    """Where each page's score stands, [B, M], with room in the RoPE tables; None if scores know no places (D3)."""
    if not config.score_rope:
        return None
    backbone.require_positions(batch.lengths_BM.shape[1] * config.page_room + 1)
    return _page_places(batch) * config.page_room


def _page_places(batch: PageBatch) -> Tensor:
    """Which page of its sequence each page is, [B, M]; every question stands behind the text's last page."""
    num_text = batch.text_lengths.shape[1]
    columns = torch.arange(batch.lengths_BM.shape[1], device=batch.lengths_BM.device)
    num_pages_B1 = (batch.text_lengths > 0).sum(1, keepdim=True)
    return torch.where(columns < num_text, columns, num_pages_B1)


def bookmark_stream(
    backbone: Backbone,
    attachment: Attachment,
    retriever: PageRetriever | None,
    bookmark: Tensor,
    batch: PageBatch,
    dense: DenseStates,
    config: RetroConfig | None = None,
    frozen: FrozenProjections | None = None,
) -> BookmarkStates:
    """Run one bookmark per page.

    Args:
        retriever: None = untrained copies. bookmark: embedding [hidden].
        dense: the frozen pass over the same batch.
        config: `bookmark_span` and `score_rope` are honoured (D13, D3); None = the defaults.
        frozen: the projections that bookmarks use where the model's own are being trained.
    """
    backbone.require_positions(_num_sink(batch) + batch.sizes.widest + 2)
    program = BookmarkProgram(backbone, retriever, batch, dense, config or RetroConfig(), frozen)
    B, M = batch.lengths_BM.shape
    rows = bookmark.to(backbone.dtype).expand(B, M, -1)
    with attachment.run(program), shapes_may_vary(backbone.device):
        if can_fuse(backbone):
            stream_rows(backbone, program, rows)
        else:
            positions = torch.zeros(B, M, dtype=torch.int64, device=backbone.device)
            backbone.decoder(inputs_embeds=rows, position_ids=positions, use_cache=False)
    return program.states


def page_scores(states: BookmarkStates, layer: int, num_questions: int = 1) -> Tensor:
    """Scores of the text pages for each query page, float32 [B, Q, P] (paper eq 6; D3-D5)."""
    return head_scores(states, layer, num_questions).sum(0)


def head_scores(states: BookmarkStates, layer: int, num_questions: int = 1) -> Tensor:
    """The part of each KV head in `page_scores`, float32 [K, B, Q, P]."""
    return layer_scores(states, [layer], num_questions, by_head=True)[0]


def layer_scores(states: BookmarkStates, layers: Sequence[int], num_questions: int, by_head: bool) -> Tensor:
    """`page_scores` of several layers, by KV head or (K = 1) summed over them, float32 [L, K, B, Q, P]."""
    q_LBQKD, k_LBPKD = _scored(states, layers, num_questions)
    if not by_head:
        return torch.einsum("lbqkd,lbpkd->lbqp", q_LBQKD, k_LBPKD)[:, None]
    return torch.einsum("lbqkd,lbpkd->lkbqp", q_LBQKD, k_LBPKD)


def batch_scores(states: BookmarkStates, layers: Sequence[int], num_questions: int, by_head: bool) -> Tensor:
    """As `layer_scores`, of the pages of all texts C of the batch, float32 [L, K, B, Q, C, P]; C = B."""
    q_LBQKD, k_LCPKD = _scored(states, layers, num_questions)
    if not by_head:
        return torch.einsum("lbqkd,lcpkd->lbqcp", q_LBQKD, k_LCPKD)[:, None]
    return torch.einsum("lbqkd,lcpkd->lkbqcp", q_LBQKD, k_LCPKD)


def _scored(states: BookmarkStates, layers: Sequence[int], num_questions: int) -> tuple[Tensor, Tensor]:
    """What is multiplied to scores: queries summed over each KV head's group and scaled (D5), and keys."""
    queries = torch.stack([states.queries[layer][:, -num_questions:] for layer in layers]).float()
    k_LBPKD = torch.stack([states.keys[layer][:, :-num_questions] for layer in layers]).float()
    H, D = queries.shape[3:]
    return queries.unflatten(3, (k_LBPKD.shape[3], -1)).sum(4) * (H * D) ** -0.5, k_LBPKD
