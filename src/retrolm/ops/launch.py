"""Whether Triton kernels run where a tensor is."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def runs_on(x: Tensor) -> bool:
    """Whether kernels run where `x` is."""
    return x.is_cuda and _has_triton()
