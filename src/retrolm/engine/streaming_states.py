"""Keys and values of whole sequences as streaming prefill makes them, for training beyond the model's window (D14 b).

Texts are read page by page into a store, as documents are, and each question behind its text as an asked one; what the
store then holds is laid out as a dense pass would have left it.
Shape letters: B sequences, T tokens, Q questions, W page size, K KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..paging import PageTable, page_lengths
from ..retriever import PageRetriever
from .chunk import Chunk
from .dense_pass import DenseStates
from .encoder import Encoder
from .page_batch import PageBatch
from .page_reading import cut_pages, paged_text
from .visible import require_invisible

if TYPE_CHECKING:
    from .model import RetroLM


@torch.no_grad()
def streaming_states(lm: RetroLM, retriever: PageRetriever, batch: PageBatch) -> DenseStates:
    """Read `batch` with the engine's own sparse prefill on `lm`'s budget, pages chosen by `retriever`.

    Keys and values are zero where there is padding.

    Raises:
        UserError: bookmarks are visible, or the budget has no room for the prefix, or for a question.
    """
    require_invisible(lm.config, "Reading training texts page by page")
    W, num_text = lm.config.page_size, batch.text_lengths.shape[1]
    ids, starts, lengths = (x.tolist() for x in (batch.tokens_BT, batch.starts_BM, batch.lengths_BM))
    pages = [
        cut_pages(row[: batch.num_prefix], row[batch.num_prefix : own_starts[num_text]], W)
        for row, own_starts in zip(ids, starts, strict=True)
    ]
    store = lm.new_store(sum(map(len, pages)))
    parts = lm.encoder_over(store, retriever=retriever).parts
    encoder = Encoder(parts, lm.attachment, retriever.embedding.detach())
    texts = [paged_text(store, cut, len(page_lengths(batch.num_prefix, W)), lm.config) for cut in pages]
    places = _Places(W, batch.tokens_BT.shape[1])
    encoder.read(texts)
    for row, text in enumerate(texts):
        places.add_text(row, text.table)
        asked = [(s, n) for s, n in zip(starts[row][num_text:], lengths[row][num_text:], strict=True) if n]
        _ask(encoder, text.table, ids[row], asked, row, places)
    layers = range(lm.backbone.num_layers)
    read = [store.read(layer, torch.cat(places.ids)) for layer in layers]
    return DenseStates(*([places.laid_out(pair[half], len(ids)) for pair in read] for half in (0, 1)))


def _ask(
    encoder: Encoder, table: PageTable, row_ids: list[int], asked: list[tuple[int, int]], row: int, places: _Places
) -> None:
    """Encode all questions on a text, each by itself behind it."""
    groups = []
    for start, length in asked:
        tokens = row_ids[start : start + length]
        ids = encoder.parts.store.reserve(len(page_lengths(length, table.page_size)))
        groups.append(encoder.query(table, ids, tokens))
        places.add_question(row, start, length, ids)
    encoder.encode(Chunk(groups, max(length for _, length in asked)))


@dataclass
class _Places:
    """Which stored rows hold which tokens of the batch.

    Attributes:
        ids: store pages, in order. sources: rows among those of the stored pages. targets: rows of [B * T].
    """

    page_size: int
    num_tokens: int
    ids: list[Tensor] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    _num_pages: int = 0

    def add_text(self, row: int, table: PageTable) -> None:
        self._add(row, 0, table.ids, table.starts, table.lengths)

    def add_question(self, row: int, start: int, length: int, ids: Tensor) -> None:
        lengths = torch.tensor(page_lengths(length, self.page_size))
        self._add(row, start, ids, torch.zeros_like(lengths), lengths)

    def _add(self, row: int, first: int, ids: Tensor, starts_P: Tensor, lengths_P: Tensor) -> None:
        inside = torch.arange(self.page_size)
        held_PW = (inside >= starts_P[:, None]) & (inside < (starts_P + lengths_P)[:, None])
        self.sources.append(held_PW.flatten().nonzero()[:, 0] + self._num_pages * self.page_size)
        self.targets.append(row * self.num_tokens + first + torch.arange(int(lengths_P.sum())))
        self.ids.append(ids)
        self._num_pages += len(ids)

    def laid_out(self, pages_PWKD: Tensor, num_sequences: int) -> Tensor:
        """Stored pages as [B, T, K, D]."""
        sources, targets = (torch.cat(x).to(pages_PWKD.device) for x in (self.sources, self.targets))
        rows = pages_PWKD.new_zeros(num_sequences * self.num_tokens, *pages_PWKD.shape[2:])
        rows.index_copy_(0, targets, pages_PWKD.flatten(0, 1).index_select(0, sources))
        return rows.unflatten(0, (num_sequences, self.num_tokens))
