"""The files of a base are safetensors files: a header that names arrays, then their bytes. No torch, no pickle.

The header is padded so that the arrays begin at a multiple of 4096 bytes. Reading trusts nothing: names, dtypes,
shapes and offsets are checked against the file's size before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .durable import DurableFile, open_regular, read_exactly
from .faults import DamagedBaseError

ALIGNMENT = 4096
MAX_HEADER_BYTES = 16 << 20
# bfloat16 has no numpy type: its bits travel as uint16.
NUMPY_OF = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "U32": np.uint32,
    "U8": np.uint8,
}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class ArrayPlace:
    """One array: its dtype as safetensors names it, shape, and place in the file (bytes)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """What a container says of itself.

    Attributes:
        data_start: bytes before the first array. sha256: digest of those bytes.
    """

    arrays: dict[str, ArrayPlace]
    metadata: dict[str, str]
    data_start: int
    sha256: str

    def array(self, name: str, what: str) -> ArrayPlace:
        """The place of one array; raises `DamagedBaseError` if there is none."""
        if name not in self.arrays:
            raise DamagedBaseError(f"{what} has no array {name!r}. Remove the document and add it again.")
        return self.arrays[name]


def num_bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(NUMPY_OF[dtype]).itemsize


def render_header(arrays: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Bytes before the data, for arrays name → (dtype, shape) that follow one another in this order."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in arrays.items():
        end = at + num_bytes_of(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    length = -(-(len(text) + _LENGTH_BYTES) // ALIGNMENT) * ALIGNMENT - _LENGTH_BYTES
    return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


def write_arrays(path: Path, arrays: Mapping[str, tuple[str, NDArray[Any]]]) -> DurableFile:
    """Write whole arrays name → (dtype, values) into a new file; returns the closed file with its size and digest.

    The widest numbers come first, so that each array begins at a multiple of its own width.
    """
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1][1].itemsize))
    with DurableFile(path) as file:
        file.write(render_header({name: (dtype, value.shape) for name, (dtype, value) in arrays.items()}, {}))
        for _, value in arrays.values():
            file.write(np.ascontiguousarray(value).tobytes())
    return file


def read_header(path: Path, what: str) -> Header:
    """Read and check a container's header; raises `DamagedBaseError`, naming the file as `what`."""
    with open_regular(path, what) as (descriptor, size):
        length = int.from_bytes(read_exactly(descriptor, 0, min(_LENGTH_BYTES, size), what), "little")
        if size < _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise _damaged(what, "its header is longer than allowed")
        head = read_exactly(descriptor, 0, _LENGTH_BYTES + length, what)
    try:
        fields = json.loads(head[_LENGTH_BYTES:])
        metadata = _metadata(fields.pop("__metadata__", {}))
        arrays = {name: _place(value, len(head)) for name, value in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(what, "its header can't be read") from None
    _require_full_cover(arrays, len(head), size, what)
    return Header(arrays, metadata, len(head), hashlib.sha256(head).hexdigest())


def read_file(path: Path, what: str) -> NDArray[np.uint8]:
    """All bytes of a file."""
    with open_regular(path, what) as (descriptor, size):
        data, at = np.empty(size, np.uint8), 0
        while at < size:
            count = os.preadv(descriptor, [data[at:].data], at)
            if not count:
                raise _damaged(what, f"it ends at byte {at}")
            at += count
    return data


def array_in(data: NDArray[np.uint8], place: ArrayPlace) -> NDArray[Any]:
    """One array of a file's bytes, in place where its address allows it."""
    dtype = np.dtype(NUMPY_OF[place.dtype])
    part = data[place.start : place.start + place.num_bytes]
    return (part if place.start % dtype.itemsize == 0 else part.copy()).view(dtype).reshape(place.shape)


def _metadata(fields: Any) -> dict[str, str]:
    if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
        raise ValueError
    return fields


def _place(fields: dict[str, Any], data_start: int) -> ArrayPlace:
    dtype, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    whole = all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, start, end))
    if not whole or dtype not in NUMPY_OF or end - start != num_bytes_of(dtype, shape):
        raise ValueError
    return ArrayPlace(dtype, shape, data_start + start, end - start)


def _require_full_cover(arrays: dict[str, ArrayPlace], data_start: int, size: int, what: str) -> None:
    at = data_start
    for place in sorted(arrays.values(), key=lambda place: (place.start, place.num_bytes)):
        if place.start != at:
            raise _damaged(what, "its arrays overlap or leave gaps")
        at += place.num_bytes
    if at != size:
        raise _damaged(what, f"it has {size} bytes where its header says {at}")


def _damaged(what: str, reason: str) -> DamagedBaseError:
    return DamagedBaseError(f"{what} is damaged: {reason}. Remove the document and add it again.")
