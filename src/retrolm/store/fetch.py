"""Copying many page records at once between addresses, one of them in pinned host memory: one kernel launch.

A few programs read over the bus while all others compute; single copies of half a megabyte would cost the host more
time than the bus.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

WORD = 8  # bytes; records must be a multiple of it
_BLOCK = 1024  # words per step
_PROGRAMS = 32  # enough bytes under way to fill the bus, few enough multiprocessors
MANY_PROGRAMS = 2048  # for copies within the device's memory


@cache
def has_triton() -> bool:
    """Whether Triton is installed, which the kernels need."""
    return find_spec("triton") is not None


def copy_records(sources: Tensor, targets: Tensor, num_bytes: int, programs: int = _PROGRAMS) -> None:
    """Copy `num_bytes` from each address of `sources` to that of `targets` (int64 [N], on the GPU) on this stream.

    Args:
        programs: how many work at once.
    """
    words = num_bytes // WORD
    blocks = -(-words // _BLOCK)
    grid = (min(programs, len(sources) * blocks),)
    from .fetch_kernel import copy_words

    with torch.cuda.device_of(sources):
        copy_words[grid](sources, targets, len(sources) * blocks, words, blocks, BLOCK=_BLOCK, num_warps=8)
