"""What is compared: one loaded model under many methods, budgets and retrievers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import RetroConfig
from ..engine.model import RetroLM
from ..engine.shipped import find_shipped, resolve_retriever
from ..errors import unknown
from ..methods import METHODS
from ..retriever import PageRetriever, load_retriever
from .readers import FULL, FullReader, Reader, RetroReader

UNTRAINED = "untrained"
NO_RETRIEVER = "none"
# These change speed and memory, never results, so they are no part of what identifies a run.
_SPEED_ONLY = ("chunk_pages", "device_kv_bytes")


@dataclass(frozen=True)
class Variant:
    """One column of a comparison.

    Attributes:
        method: "full" or a page-selection method. kv_budget: tokens; None for "full".
        retriever: "auto" (the shipped one, or untrained), "none" (untrained), a folder or a shipped name; None for
            methods without bookmarks.
    """

    method: str
    kv_budget: int | None = None
    retriever: str | None = None


@dataclass(frozen=True)
class OpenVariant:
    """A variant ready to answer.

    Attributes:
        facts: what identifies its rows: model, dtype, retriever, adapter, method, kv_budget, options, digests.
        num_window: positions of the model's window.
    """

    lm: RetroLM
    reader: Reader
    facts: dict[str, Any]

    @property
    def num_window(self) -> int:
        return self.lm.backbone.window


def variants_of(methods: Sequence[str], kv_budgets: Sequence[int], retrievers: Sequence[str]) -> list[Variant]:
    """All combinations that differ: dense attention has no budget, and only bookmark methods a retriever.

    Raises `UserError` for an unknown method.
    """
    found: dict[Variant, None] = {}
    for method in methods:
        if method == FULL:
            found[Variant(FULL)] = None
            continue
        if method not in METHODS:
            raise unknown("method", method, [FULL, *METHODS])
        own = retrievers if METHODS.get(method).needs_bookmarks else [None]
        found.update(dict.fromkeys(Variant(method, budget, name) for budget in kv_budgets for name in own))
    return list(found)


class VariantLoader:
    """Opens variants around one loaded model, one at a time.

    Args:
        lm: a loaded engine; its model and tokenizer are used, its own attachment is removed.
        model_name: for the rows. config: options of all variants but for the budget.
    """

    def __init__(self, lm: RetroLM, model_name: str, config: RetroConfig, keep_pages: bool = False) -> None:
        self._lm = lm
        self._model_name = model_name
        self._config = config
        self._keep_pages = keep_pages
        self._retrievers: dict[str, PageRetriever] = {}
        self._digests: dict[str, str] = {}

    @property
    def tokenizer(self) -> Any:
        return self._lm.tokenizer

    def check(self, variants: Sequence[Variant]) -> None:
        """Raise what `open` would raise for any of the variants, before any work is done."""
        for variant in variants:
            self.open(variant)

    def open(self, variant: Variant) -> OpenVariant:
        """Attach a variant to the model, in place of the one before.

        Raises:
            UserError: a budget beyond the window, an unknown retriever; IncompatibleRetrieverError: not this model's.
        """
        self._lm.detach()
        full = variant.method == FULL
        config = self._config if variant.kv_budget is None else self._config.replace(kv_budget=variant.kv_budget)
        method = "recency" if full else variant.method  # dense passes run outside of any method
        lm = RetroLM(self._lm.model, self._lm.tokenizer, config=config, method=method)
        self._lm = lm
        retriever = None if variant.retriever is None else self._retriever(lm, variant.retriever)
        if retriever is not None:
            lm.use_retriever(retriever)
        reader = FullReader(lm) if full else RetroReader(lm, self._keep_pages)
        return OpenVariant(lm, reader, self._facts(lm, variant, retriever))

    def _retriever(self, lm: RetroLM, name: str) -> PageRetriever | None:
        if name == NO_RETRIEVER:
            return None
        path = find_shipped(lm.backbone) if name == "auto" else resolve_retriever(name)
        if path is None:
            return None
        if name not in self._retrievers:
            self._retrievers[name] = _load(lm, path)
            self._digests[name] = retriever_digest(self._retrievers[name])
        return self._retrievers[name]

    def _facts(self, lm: RetroLM, variant: Variant, retriever: PageRetriever | None) -> dict[str, Any]:
        full = variant.method == FULL
        options = {key: value for key, value in asdict(lm.config).items() if key not in (*_SPEED_ONLY, "kv_budget")}
        return {
            "model": self._model_name,
            "backbone": lm.backbone.fingerprint(),
            "dtype": str(lm.backbone.dtype).removeprefix("torch."),
            "retriever": None if variant.retriever is None else retriever.card.name if retriever else UNTRAINED,
            "retriever_digest": self._digests[variant.retriever] if variant.retriever and retriever else None,
            "adapter": adapter_name(lm.model),
            "method": variant.method,
            "prefill": "dense" if full else "streaming",
            "kv_budget": variant.kv_budget,
            "options": {"prefix_page": lm.config.prefix_page} if full else options,
        }


def _load(lm: RetroLM, path: Path) -> PageRetriever:
    return load_retriever(path, lm.backbone.projection_shapes(), lm.backbone.fingerprint())


def retriever_digest(retriever: PageRetriever) -> str:
    """Hash of a retriever's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(retriever.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def adapter_name(model: Any) -> str | None:
    """Names of the adapters loaded into a model (transformers' own or PEFT's), or None."""
    return ", ".join(sorted(getattr(model, "peft_config", None) or {})) or None
