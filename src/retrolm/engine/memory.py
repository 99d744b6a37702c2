"""How much memory a piece of work takes: highest resident set of the process, highest allocation on CUDA devices."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterable
from types import TracebackType

import psutil
import torch

_SAMPLE_S = 0.005


class PeakMemory:
    """Context manager that watches memory while its block runs.

    Attributes:
        host_start_bytes, host_peak_bytes: resident set of this process when the block began, and at its highest
            (sampled every 5 ms).
        device_start_bytes, device_peak_bytes: bytes of tensors on the CUDA devices given, likewise; 0 without any.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._devices = sorted({device for device in devices if device.type == "cuda"}, key=str)
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.host_start_bytes = self.host_peak_bytes = 0
        self.device_start_bytes = self.device_peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        release_free_memory()
        self.host_start_bytes = self.host_peak_bytes = self._process.memory_info().rss
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)
        self.device_start_bytes = sum(torch.cuda.memory_allocated(device) for device in self._devices)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        self.device_peak_bytes = sum(torch.cuda.max_memory_allocated(device) for device in self._devices)

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        self.host_peak_bytes = max(self.host_peak_bytes, self._process.memory_info().rss)


def release_free_memory() -> None:
    """Hand memory that is no longer used back to the operating system, so that a measurement starts clean."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights and buffers; tied weights count once."""
    seen: dict[tuple[torch.device, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        seen[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
