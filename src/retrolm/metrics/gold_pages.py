"""Which pages hold the evidence, from the places of the evidence in the text (spec D15 b)."""

from __future__ import annotations

from collections.abc import Iterable

MIN_OVERLAP_TOKENS = 8
MIN_OVERLAP_SHARE = 0.25


def evidence_pages(spans: Iterable[tuple[int, int]], page_size: int) -> tuple[set[int], set[int]]:
    """Return (positives, touched): pages that hold a token span's evidence, and all pages any span touches.

    A page is positive for a span if it overlaps it by at least `max(8, 25% of the span)` tokens, where a span counts
    as at most two pages long, so that every page well inside a long span is positive; the page of the largest overlap
    always is. Page 0 begins at token 0.
    """
    positives: set[int] = set()
    touched: set[int] = set()
    for span in spans:
        overlaps = _overlaps(span, page_size)
        touched.update(overlaps)
        needed = _needed_overlap(span, page_size, max(overlaps.values(), default=0))
        positives.update(page for page, overlap in overlaps.items() if overlap >= needed)
    return positives, touched


def _overlaps(span: tuple[int, int], page_size: int) -> dict[int, int]:
    start, end = span
    pages = range(start // page_size, -(-end // page_size)) if end > start else range(0)
    return {page: min(end, (page + 1) * page_size) - max(start, page * page_size) for page in pages}


def _needed_overlap(span: tuple[int, int], page_size: int, largest: int) -> float:
    counted = min(span[1] - span[0], 2 * page_size)
    return min(max(MIN_OVERLAP_TOKENS, MIN_OVERLAP_SHARE * counted), largest)
