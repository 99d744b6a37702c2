"""Transformers' text-generation pipeline over `RetroLM.generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TextGenerationPipeline

if TYPE_CHECKING:
    from .model import RetroLM


class OnBudget:
    """Stands in for the stock model: `generate` goes through RetroLM, all else to the model."""

    def __init__(self, lm: RetroLM) -> None:
        self._lm = lm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm.model, name)

    def generate(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """`RetroLM.generate`; options that are None are as good as left out."""
        given = {key: value for key, value in options.items() if value is not None}
        ids = torch.empty(1, 0, dtype=torch.int64) if input_ids is None else input_ids
        return self._lm.generate(ids, attention_mask=attention_mask, **given)


class RetroLMPipeline(TextGenerationPipeline):
    """The stock pipeline (prompts, chats, batches, streamers) with its prompts read page by page on the KV budget."""

    def __init__(self, lm: RetroLM, **options: Any) -> None:
        device = None if getattr(lm.model, "hf_device_map", None) else lm.device
        super().__init__(model=OnBudget(lm), tokenizer=lm.tokenizer, device=device, task="text-generation", **options)

    def check_model_type(self, supported_models: Any) -> None:
        """The family was checked when RetroLM attached to the model."""
