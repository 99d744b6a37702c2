"""Variants under a LoRA adapter: the paper's stage 2, and its fine-tuned controls (any method, full attention too)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.adapter import LoraAdapter, load_adapter
from ..engine.shipped_adapters import adapter_for
from ..errors import UserError
from .variants import OpenVariant, Variant, VariantLoader, retriever_digest

NO_ADAPTER = "none"


@dataclass(frozen=True)
class AdaptedVariant(Variant):
    """A variant with an adapter on the model; `adapter` is its folder, a shipped name or "auto"."""

    adapter: str = NO_ADAPTER


def with_adapters(variants: Sequence[Variant], adapters: Sequence[str]) -> list[Variant]:
    """Each variant with each adapter; "none" leaves the model as it is."""
    found: dict[Variant, None] = {}
    for adapter in adapters:
        for variant in variants:
            fields = {item.name: getattr(variant, item.name) for item in dataclasses.fields(Variant)}
            found[variant if adapter == NO_ADAPTER else AdaptedVariant(**fields, adapter=adapter)] = None
    return list(found)


class AdapterLoader(VariantLoader):
    """Opens variants with and without adapters."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._adapters: dict[str, LoraAdapter] = {}

    def open(self, variant: Variant) -> OpenVariant:
        """See `VariantLoader.open`; raises `UserError` also for an adapter that isn't this model's."""
        opened = super().open(variant)
        if not isinstance(variant, AdaptedVariant):
            return opened
        adapter = self._adapter(opened, variant.adapter)
        opened.lm.use_adapter(adapter)
        name = adapter.card.name if adapter.card.name != "untitled" else Path(variant.adapter).name
        facts = {**opened.facts, "adapter": name, "adapter_digest": retriever_digest(adapter)}
        return dataclasses.replace(opened, facts=facts)

    def _adapter(self, opened: OpenVariant, folder: str) -> LoraAdapter:
        if folder not in self._adapters:
            path = adapter_for(opened.lm.backbone, folder)
            if path is None:
                raise UserError("No adapter is shipped for this model. Give the folder of one, or --adapter none.")
            self._adapters[folder] = load_adapter(path, opened.lm.backbone)
        return self._adapters[folder]
