"""Texts cut into pages and read side by side into a page store of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import RetroConfig
from ..paging import PageTable, page_lengths
from ..store import PageStore
from .chunk import text_lengths
from .document import Document
from .encoder import PagedText, Progress
from .sources import tokenise

if TYPE_CHECKING:
    from .model import RetroLM


def read_pages(
    lm: RetroLM, sources: list[Any], progress: Progress | None = None, heads: Sequence[Sequence[int]] | None = None
) -> list[Document]:
    """Read texts side by side, page by page, as `read` does for page methods.

    Args:
        heads: ids that stand before each text; None = BOS and the chat template's head.
    """
    inputs = [tokenise(lm, source) for source in sources]
    given: Sequence[Sequence[int] | None] = heads if heads is not None else [None] * len(inputs)
    splits = [lm.split_head(head) for head in given]
    started = time.perf_counter()
    pages = [
        cut_pages(prefix, joined + ids, lm.config.page_size)
        for (prefix, joined), (_, ids, _) in zip(splits, inputs, strict=True)
    ]
    store = lm.new_store(sum(map(len, pages)))
    sinks = [len(page_lengths(len(prefix), lm.config.page_size)) for prefix, _ in splits]
    texts = [paged_text(store, cut, num_prefix, lm.config) for cut, num_prefix in zip(pages, sinks, strict=True)]
    encoder = lm.encoder_over(store)
    results = encoder.read(texts, progress)
    lm.wait()
    seconds = time.perf_counter() - started
    peak = max(result.peak_attended for result in results)
    return [
        Document(lm, encoder, text, paged.table, page_spans(paged.pages, offsets), paged.pages, seconds, peak)
        for (text, _, offsets), paged in zip(inputs, texts, strict=True)
    ]


def page_logits(lm: RetroLM, input_ids: Tensor) -> Tensor:
    """`logits` of page methods: the text is read page by page."""
    cut = cut_pages([], input_ids.tolist(), lm.config.page_size)
    store = lm.new_store(len(cut))
    results = lm.encoder_over(store).read([paged_text(store, cut, 0, lm.config)], logits=True)
    return torch.cat([result.logits for result in results if result.logits is not None])


def cut_pages(prefix: list[int], ids: list[int], page_size: int) -> list[list[int]]:
    """Token ids by page: prefix pages broken off before the text (the attention sink), then the text."""
    return [part[i : i + page_size] for part in (prefix, ids) for i in range(0, len(part), page_size)]


def paged_text(store: PageStore, pages: list[list[int]], num_prefix_pages: int, config: RetroConfig) -> PagedText:
    """Pages with places in `store`; the prefix pages are sinks, or the first page where there are none."""
    lengths = text_lengths(pages, config)
    table = PageTable(store.reserve(len(pages)), lengths, max(num_prefix_pages, 1), config.page_room)
    return PagedText(table, pages)


def page_spans(pages: list[list[int]], offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Character span of each page from those of the text's tokens; (0, 0) for prefix pages and without offsets."""
    if not offsets:
        return [(0, 0)] * len(pages)
    num_prefix = sum(map(len, pages)) - len(offsets)
    spans, at = [], -num_prefix
    for page in pages:
        stop = at + len(page)
        spans.append((offsets[max(at, 0)][0], offsets[stop - 1][1]) if stop > 0 else (0, 0))
        at = stop
    return spans
