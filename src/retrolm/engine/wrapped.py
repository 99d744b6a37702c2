"""Models that PEFT has wrapped: bookmark rows go past the adapters, through the weights W^b was trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .running import num_bookmark_rows


def bypass_adapters(decoder: nn.Module) -> list[Any]:
    """Let bookmark rows go past the adapters around any module of a decoder; returns the handles that undo it."""
    wrapped = [m for m in decoder.modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")]
    return [module.register_forward_hook(_plain_bookmarks) for module in wrapped]


def _plain_bookmarks(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
    marks = num_bookmark_rows()
    if not marks:
        return None
    if module.merged:
        raise UserError(
            "An adapter is merged into the weights, so bookmark rows can't go past it. Call unmerge_adapter(), or "
            "merge_and_unload() and train a retriever for the merged model."
        )
    plain = module.base_layer(args[0][..., -marks:, :])
    return torch.cat([out[..., :-marks, :], plain], -2)
