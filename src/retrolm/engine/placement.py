"""Where a module computes and what its weights are, also where accelerate keeps them elsewhere between passes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """The device a module computes on: its weights', or the one its accelerate hook fetches them to."""
    first = next(chain(module.parameters(), module.buffers()))
    if not first.is_meta:
        return first.device
    for part in module.modules():
        for hook in _hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    return first.device


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; the host doesn't wait until a GPU has come to read it."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The value of a module's own parameter `name`, on the device the module computes on."""
    value: Tensor = getattr(module, name).detach()
    if not value.is_meta:
        return value
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            kept: Tensor = weights[name]
            return kept.to(device_of(module))
    return value


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The accelerate hooks on one module, chained ones too."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", [hook] if hook is not None else [])
