"""Rows of data sets on the Hugging Face hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...errors import UserError
from .documents import as_document
from .readers import flagembedding_row
from .rows import Document, PairRow, RowCounts, checked


def read_hub_pairs(dataset_id: str, split: str, source: str, counts: RowCounts) -> Iterator[PairRow]:
    """Yield the rows of a hub data set with the columns `query`, `pos`, `neg`, without downloading it whole.

    Raises `UserError` if the package `datasets` is missing, the data set can't be opened, or no row is usable.
    """
    stream = _rows(dataset_id, split)
    rows = (flagembedding_row(dict(row), f"{source}-{number}", source) for number, row in enumerate(stream))
    yield from checked(rows, counts, f"data set {dataset_id}")


def read_hub_documents(dataset_id: str, split: str, counts: RowCounts) -> Iterator[Document]:
    """Yield the documents of a hub data set with a column `text`, without downloading it whole.

    Raises `UserError` as `read_hub_pairs`.
    """
    yield from checked(map(as_document, _rows(dataset_id, split)), counts, f"data set {dataset_id}")


def _rows(dataset_id: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError("Reading from the hub needs the package datasets: pip install datasets.") from error
    try:
        stream = datasets.load_dataset(dataset_id, split=split, streaming=True)
    except Exception as error:  # the hub's client raises many types for "not there" and "no network"
        raise UserError(f"Can't open data set {dataset_id!r}, split {split!r}: {error}. Check the id.") from error
    yield from map(dict, stream)
