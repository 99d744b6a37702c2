"""The name under which stock models take a cache: `cache` from transformers 5.24 on, `past_key_values` before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """A transformers `Cache` (or None) as the keyword argument of `module(...)` and of its `generate`."""
    return {_name(type(module).forward): cache}


@functools.cache
def _name(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
