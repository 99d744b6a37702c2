"""Streaming prefill: each page attends its sink, previous and selected pages, in every layer (paper eq 3-6).

All pages of a chunk are encoded in one forward pass, normal rows first, bookmark rows behind. Selection in a layer
depends only on that layer's inputs, so any chunking gives the same numbers (D10). Who chooses: `page_choice`; who
gathers and attends: `set_attention`, and `bookmark_rows` for bookmarks; what is kept of a question: `captures`.
Shape letters: T tokens of a chunk, N pages of it, n pages of a group, Q rows of each, W page size, H, K, D heads.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor
from torch.profiler import record_function

from ..methods import PageTensors
from ..ops.rotary import unscaled
from .bookmark_rows import attend_bookmark_rows
from .captures import LayerChoice, QueryCapture
from .chunk import Chunk, PageGroup
from .group_tensors import GroupTensors
from .layer_call import LayerCall
from .page_choice import PageChooser, PageSets
from .page_records import write_pages
from .page_rows import PageRows, TokenRows
from .prefill_parts import PrefillParts
from .set_attention import SetAttention

__all__ = ["OWN_RANGE", "LayerChoice", "PrefillParts", "PrefillProgram", "QueryCapture"]

OWN_RANGE = "retrolm"  # how a profiler tells the engine's operators from the stock model's


class PrefillProgram:
    """The forward pass of one chunk (a `Program` for `Attachment.run`); call `finish` behind it.

    No layer waits for the device, as long as the page store doesn't.

    Attributes:
        captures: of each question, in order. peak_attended: most tokens attended in layers that choose pages.
    """

    def __init__(self, parts: PrefillParts, chunk: Chunk) -> None:
        self.parts = parts
        self.chunk = chunk
        self.num_bookmarks = chunk.num_pages if parts.method.needs_bookmarks else 0
        captures = [_captures(group, parts.config.page_marks) for group in chunk.groups]
        self.captures = list(chain.from_iterable(captures))
        self.peak_attended = 0
        self._chooser = PageChooser(parts)
        self._sets = [SetAttention(parts, *pair) for pair in zip(chunk.groups, captures, strict=True)]
        self._rows = PageRows(chunk)
        self._content: Tensor | None = None
        self._tensors: dict[tuple[int, torch.device], GroupTensors] = {}

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        with record_function(OWN_RANGE):
            return self._project(layer, name, rows, out) if self.num_bookmarks else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        with record_function(OWN_RANGE):
            return self._attend(LayerCall(layer, scale, softcap), q, k, v)

    def _project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
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

    def _attend(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer, rope = call.layer, self.parts.backbone.rope(call.layer)
        q, k = (unscaled(x[0].transpose(0, 1), rope.scaling, rope.rotary_dims) for x in (q, k))
        v = v[0].transpose(0, 1)
        T, width = self._rows.num_tokens, self.chunk.width
        marks = (q[T:], k[T:], v[T:])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        q, k, v, own_out = (self._rows.in_order(x) for x in (q, k, v, out))
        k_NQKD, v_NQKD = (self._rows.by_page(x) for x in (k, v))
        groups = self._groups(q.device)
        chosen = self._choose(layer, groups, self._queries(layer, q), k_NQKD, v_NQKD, marks)
        for (where, group, tensors, own_sets), sets in zip(groups, chosen, strict=True):
            rows = self._rows.of_pages(where)
            own_sets.attend(call, tensors, sets, TokenRows(q[rows], k[rows], v[rows], own_out[rows]))
            if self.num_bookmarks:
                own_marks = (marks[0][where], marks[1][where], marks[2][where])
                own_k, own_v = k_NQKD[where, :width], v_NQKD[where, :width]
                out[T:][where] = attend_bookmark_rows(self.parts, call, group, tensors, own_marks, own_k, own_v)
        self._rows.put_back(own_out, out)
        return out[None]

    def _queries(self, layer: int, q_RHD: Tensor) -> Tensor:
        """Queries page by page for methods that look at them, else none."""
        if self.parts.method_for(layer).reads_queries:
            return self._rows.by_page(q_RHD)[:, : self.chunk.width]
        return q_RHD.new_empty(self.chunk.num_pages, 0, *q_RHD.shape[1:])

    def _choose(
        self,
        layer: int,
        groups: list[tuple[slice, PageGroup, GroupTensors, SetAttention]],
        q_NQHD: Tensor,
        k_NQKD: Tensor,
        v_NQKD: Tensor,
        marks: tuple[Tensor, Tensor, Tensor],
    ) -> list[PageSets]:
        """Store each group's keys and values, and choose what it attends."""
        found = []
        for where, group, tensors, _ in groups:
            own_q, own_k, own_v = q_NQHD[where], k_NQKD[where], v_NQKD[where]
            write_pages(self.parts.store, layer, group, own_k, own_v)
            own_k = own_k[:, : self.chunk.width]
            pages = self._page_tensors(layer, group, tensors, own_q, own_k, where, marks)
            found.append(self._chooser.choose(layer, group, tensors, pages))
        return found

    def finish(self) -> None:
        """Bring to the host what the pass has kept on the device."""
        for capture in self.captures:
            capture.finish()
        found = {id(tokens): tokens for own in self._sets for tokens in own.attended}
        self.peak_attended = max((int(tokens) for tokens in found.values()), default=0)

    def _groups(self, device: torch.device) -> list[tuple[slice, PageGroup, GroupTensors, SetAttention]]:
        """Each group with its place among the chunk's pages and what belongs to it."""
        found = []
        for index, (group, where) in enumerate(self.chunk.slices()):
            if (index, device) not in self._tensors:
                self._tensors[index, device] = GroupTensors(group, device)
            found.append((where, group, self._tensors[index, device], self._sets[index]))
        return found

    def _page_tensors(
        self,
        layer: int,
        group: PageGroup,
        tensors: GroupTensors,
        q_nQHD: Tensor,
        k_nQKD: Tensor,
        where: slice,
        marks: tuple[Tensor, Tensor, Tensor],
    ) -> PageTensors:
        pages = PageTensors(layer, q_nQHD, k_nQKD, tensors.own_tokens, tensors.ordinals)
        if self.parts.method.needs_rope:
            rope, pages.page_size = self.parts.backbone.rope(layer), self.parts.config.page_room
            rope.require((max(group.num_past) + 1) * pages.page_size + self.chunk.width)
            pages.rope = rope.at
        if self.num_bookmarks:
            keys = marks[1]
            if self._content is not None and not self.parts.config.score_rope:
                keys = self._content[0].reshape(keys.shape)
            pages.bookmark_q_NHD, pages.bookmark_k_NKD = marks[0][where], keys[where]
        if self.parts.config.score_rope:
            rope, size = self.parts.backbone.rope(layer), self.parts.config.page_room
            rope.require(max(group.num_past) * size + 1)
            pages.page_cos, pages.page_sin = rope.at(tensors.ordinals * size)
        return pages


def _captures(group: PageGroup, num_marks: int) -> list[QueryCapture]:
    """One for each question of a group; none for text."""
    if not group.is_query:
        return []
    firsts = group.firsts or [0]
    ends = [end + len(tokens) for end, tokens in zip(group.end, group.tokens, strict=True)]
    return [QueryCapture(end, num_marks, first) for end, first in zip(ends, firsts, strict=True)]
