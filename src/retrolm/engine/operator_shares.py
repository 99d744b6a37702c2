"""Where the time of reading goes: matrix products, attention, the stock layers' other operators, and the engine's own.

Measured with PyTorch's profiler, which slows small operators down more than large ones: the engine's own share, which
is made of small ones, is an upper bound.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .model import RetroLM
from .prefill import OWN_RANGE

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_int_mm")
_ROOMS = ("products", "attention", "stock", "own")


@dataclass(frozen=True)
class OperatorShares:
    """Shares of the time that operators took while a text was read; they add up to 1.

    Attributes:
        products: matrix products. attention: softmax attention over gathered sets.
        stock: what else the stock model does (norms, activations, residual sums, its own RoPE, embeddings).
        own: what else the engine does (choosing, gathering, rotating, storing, bookmarks' softmax).
        largest_own: the engine's own operators that took longest, name → share; "between operators" is Python's time.
        seconds: all operators together, profiling included.
    """

    num_tokens: int
    products: float
    attention: float
    stock: float
    own: float
    largest_own: dict[str, float]
    seconds: float


def operator_shares(lm: RetroLM, input_ids: Tensor, num_largest: int = 8) -> OperatorShares:
    """Read `input_ids` int64 [T] twice, the second time under the profiler."""
    lm.read(input_ids).close()
    on_gpu = lm.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        lm.read(input_ids).close()
    times: dict[str, float] = defaultdict(float)
    own: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        took = float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        room = _room(event)
        times[room] += took
        if room == "own":
            own["between operators" if event.name == OWN_RANGE else _plain_name(event)] += took
    total = sum(times.values())
    largest = sorted(own.items(), key=lambda item: -item[1])[:num_largest]
    return OperatorShares(
        num_tokens=len(input_ids),
        **{room: times[room] / total for room in _ROOMS},
        largest_own={name: took / total for name, took in largest},
        seconds=total / 1e6,
    )


def _room(event: Any) -> str:
    name = _plain_name(event)
    if "scaled_dot_product" in name or "flash_attn" in name or "efficient_attention" in name:
        return "attention"
    if name in _PRODUCTS:
        return "products"
    return "own" if _is_own(event) else "stock"


def _plain_name(event: Any) -> str:
    return str(event.name).removeprefix("aten::")


def _is_own(event: Any) -> bool:
    """Whether an operator ran inside the engine's part of a pass."""
    while event is not None:
        if event.name == OWN_RANGE:
            return True
        event = event.cpu_parent
    return False
