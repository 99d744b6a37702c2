"""Question rows from the Hugging Face hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import UserError
from .readers import flagembedding_row
from .rows import PairRow, RowCounts, checked


def read_hub_pairs(dataset_id: str, split: str, source: str, counts: RowCounts) -> Iterator[PairRow]:
    """Yield the rows of a hub data set with the columns `query`, `pos`, `neg`, without downloading it whole.

    Raises `UserError` if the package `datasets` is missing, the data set can't be opened, or no row is usable.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("Reading from the hub needs the package datasets: pip install datasets.") from error
    try:
        stream = datasets.load_dataset(dataset_id, split=split, streaming=True)
    except Exception as error:  # the hub's client raises many types for "not there" and "no network"
        raise UserError(f"Can't open data set {dataset_id!r}, split {split!r}: {error}. Check the id.") from error
    rows = (flagembedding_row(dict(row), f"{source}-{number}", source) for number, row in enumerate(stream))
    yield from checked(rows, counts, f"data set {dataset_id}")
