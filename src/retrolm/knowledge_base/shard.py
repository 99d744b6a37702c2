"""Pages of one document on disk: a safetensors file with one array `pages` [layers, pages, 2, *half].

A record is what stands under [layer, page]: keys before RoPE, then values, each [W, K, D]; or the two halves of a
quantised record (`store.quantise`). Each has a CRC-32 in the index. Reading takes exactly the records asked for, and
checks each the first time.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .container import NUMPY_OF, num_bytes_of, read_header, render_header
from .durable import DurableFile, open_regular, read_exactly
from .faults import DamagedBaseError

ARRAY = "pages"


@dataclass(frozen=True)
class RecordShape:
    """What one record holds, the same in all of a base: two halves, in general keys and values.

    Attributes:
        dtype: of stored numbers, as safetensors names it; U8 for quantised pages.
        half: shape of a half: [W, K, D], or [bytes] for quantised pages.
    """

    dtype: str
    num_layers: int
    half: tuple[int, ...]

    @property
    def record_bytes(self) -> int:
        return num_bytes_of(self.dtype, (2, *self.half))

    def file_shape(self, num_pages: int) -> tuple[int, ...]:
        return (self.num_layers, num_pages, 2, *self.half)

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "num_layers": self.num_layers, "half": list(self.half)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RecordShape:
        """From a manifest's `pages`; raises `DamagedBaseError` for what can't be."""
        dtype, num_layers, half = (fields.get(key) for key in ("dtype", "num_layers", "half"))
        sizes = [num_layers, *half] if isinstance(half, list) and half else [0]
        if dtype not in NUMPY_OF or not all(type(n) is int and 0 < n < 1 << 24 for n in sizes):
            raise DamagedBaseError("The manifest's shape of pages can't be. Restore the base from a copy.")
        return cls(str(dtype), sizes[0], tuple(sizes[1:]))


class PageWriter:
    """Writes a page file front to back: all pages of layer 0, then of layer 1, ….

    Attributes:
        crc32: checksums of the records written so far, uint32 [layers, pages].
    """

    def __init__(self, path: Path, shape: RecordShape, num_pages: int) -> None:
        self._shape, self._num_pages = shape, num_pages
        self.crc32 = np.zeros((shape.num_layers, num_pages), np.uint32)
        self._written = 0
        self.file = DurableFile(path)
        self.file.write(render_header({ARRAY: (shape.dtype, shape.file_shape(num_pages))}, {}))

    def write(self, records: bytes | memoryview) -> None:
        """Append whole records in file order; page data counts in no digest but its own checksums."""
        size = self._shape.record_bytes
        view = memoryview(records).cast("B")
        for at in range(0, len(view), size):
            self.crc32.flat[self._written] = zlib.crc32(view[at : at + size])
            self._written += 1
        self.file.write(view, digest=False)

    def close(self) -> None:
        """Finish; every record must have been written."""
        assert self._written == self.crc32.size, f"{self._written} of {self.crc32.size} records written"
        self.file.close()


class PageReader:
    """Reads records of one page file.

    Args:
        crc32: their checksums, uint32 [layers, pages]. header_sha256: of the file's header, as the manifest says.
        what: name for messages.

    Raises:
        DamagedBaseError: the file is missing, or not of the expected shape.
    """

    def __init__(
        self, path: Path, shape: RecordShape, crc32: NDArray[np.uint32], header_sha256: str, what: str
    ) -> None:
        self._path, self._crc32, self._what = path, crc32, what
        self._num_pages = crc32.shape[1]
        self._record_bytes = shape.record_bytes
        header = read_header(path, what)
        place = header.array(ARRAY, what)
        expected = (shape.dtype, shape.file_shape(self._num_pages))
        if header.sha256 != header_sha256 or (place.dtype, place.shape) != expected:
            raise DamagedBaseError(
                f"{what} is damaged: its header isn't the one written. Remove the document and add it again."
            )
        self._start = place.start
        self._checked = np.zeros(crc32.shape, bool)
        self.bytes_read = 0

    def read(self, layer: int, pages: Sequence[int], out: NDArray[np.uint8], rows: Sequence[int]) -> None:
        """Fill row `rows[i]` of `out` uint8 [n, record bytes] with the record of page `pages[i]` in a layer.

        Raises:
            DamagedBaseError: a record is missing or doesn't match its checksum.
        """
        with open_regular(self._path, self._what) as (descriptor, _):
            for page, row in zip(pages, rows, strict=True):
                self._read_record(descriptor, layer, page, out[row])

    def read_run(self, layer: int, first: int, stop: int) -> bytes:
        """The records of pages [first, stop) in a layer, checked."""
        size, start = self._record_bytes, self._place(layer, first)
        with open_regular(self._path, self._what) as (descriptor, _):
            data = read_exactly(descriptor, start, (stop - first) * size, self._what)
        for page in range(first, stop):
            at = (page - first) * size
            self._check(layer, page, memoryview(data)[at : at + size])
        return data

    def _read_record(self, descriptor: int, layer: int, page: int, out: NDArray[np.uint8]) -> None:
        view, at = out.data, self._place(layer, page)
        while len(view):
            count = os.preadv(descriptor, [view], at)
            if not count:
                raise DamagedBaseError(
                    f"{self._what} is cut short: page {page} of layer {layer} is missing. Remove the document and "
                    "add it again."
                )
            view, at = view[count:], at + count
        self.bytes_read += self._record_bytes
        self._check(layer, page, out.data)

    def _place(self, layer: int, page: int) -> int:
        return self._start + (layer * self._num_pages + page) * self._record_bytes

    def _check(self, layer: int, page: int, record: memoryview) -> None:
        if self._checked[layer, page]:
            return
        if zlib.crc32(record) != self._crc32[layer, page]:
            raise DamagedBaseError(
                f"{self._what} is damaged: page {page} of layer {layer} doesn't match its checksum. Remove the "
                "document and add it again."
            )
        self._checked[layer, page] = True
