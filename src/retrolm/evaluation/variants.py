"""What is compared: one loaded model under many methods, budgets and retrievers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import RetroConfig
from ..engine.model import RetroLM
from ..engine.shipped import find_shipped, resolve_retriever
from ..methods import METHODS
from ..retriever import PageRetriever, load_retriever
from .readers import Reader, RetroReader

UNTRAINED = "untrained"
NO_RETRIEVER = "none"
# These change speed and memory, never results, so they are no part of what identifies a run.
_SPEED_ONLY = ("chunk_pages", "device_kv_bytes")
# Left out where unset: rows from before there were such options count.
_LATER = {"agreement_layers": 0, "word_weight": 0.0, "whole_sentences": False}


@dataclass(frozen=True)
class Variant:
    """One column of a comparison.

    Attributes:
        method: name of the method. kv_budget: tokens; None for methods without a budget.
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
    """All combinations that differ: dense attention has no budget, only bookmark methods have a retriever.

    Raises `UserError` for an unknown method.
    """
    found: dict[Variant, None] = {}
    for method in methods:
        kind = METHODS.get(method)
        budgets: Sequence[int | None] = kv_budgets if kind.has_budget else [None]
        own: Sequence[str | None] = retrievers if kind.needs_bookmarks else [None]
        found.update(dict.fromkeys(Variant(method, budget, name) for budget in budgets for name in own))
    return list(found)


class VariantLoader:
    """Opens variants around one loaded model, one at a time.

    Args:
        lm: a loaded engine; its model and tokenizer are used, its own attachment is removed.
        model_name: for the rows. config: options of all variants but for the budget.
        method_options: knobs by method.
    """

    def __init__(
        self,
        lm: RetroLM,
        model_name: str,
        config: RetroConfig,
        keep_pages: bool = False,
        method_options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._lm = lm
        self._model_name = model_name
        self._config = config
        self._keep_pages = keep_pages
        self._method_options = method_options or {}
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
        config = self._config if variant.kv_budget is None else self._config.replace(kv_budget=variant.kv_budget)
        lm = RetroLM(
            self._lm.model,
            self._lm.tokenizer,
            config=config,
            method=variant.method,
            method_options=self._method_options.get(variant.method),
        )
        self._lm = lm
        retriever = None if variant.retriever is None else self._retriever(lm, variant.retriever)
        if retriever is not None:
            lm.use_retriever(retriever)
        return OpenVariant(lm, RetroReader(lm, self._keep_pages), self._facts(lm, variant, retriever))

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
        knobs = lm.program.knobs()
        return {
            "model": self._model_name,
            "backbone": lm.backbone.fingerprint(),
            "dtype": str(lm.backbone.dtype).removeprefix("torch."),
            "retriever": None if variant.retriever is None else retriever.card.name if retriever else UNTRAINED,
            "retriever_digest": self._digests[variant.retriever] if variant.retriever and retriever else None,
            "adapter": adapter_name(lm.model),
            "method": variant.method,
            "prefill": lm.method.prefill,
            "kv_budget": variant.kv_budget,
            "options": _options(lm),
            **({"knobs": knobs} if knobs else {}),
        }


def settings_of(facts: Mapping[str, Any]) -> str:
    """What a run's options and knobs differ in from the defaults, as they are given to --set; "" = in nothing.

    Args:
        facts: those of an `OpenVariant`, or a cell's identity that holds them.
    """
    kind = METHODS.get(facts["method"])
    options = facts["options"] if kind.config_fields is not None else {**_LATER, **facts["options"]}
    usual = {**asdict(RetroConfig()), "agreement_layers": kind.agreement_layers}
    usual["word_weight"] = kind.word_weight if options.get("agreement_layers") else 0.0
    usual["whole_sentences"] = bool(options.get("word_weight"))
    knobs = facts.get("knobs", {})
    usual_knobs = asdict(kind.Knobs())
    changed = [f"{key}={value}" for key, value in options.items() if value != usual[key]]
    changed += [f"{kind.name}.{key}={value}" for key, value in knobs.items() if value != usual_knobs[key]]
    return ", ".join(changed)


def _options(lm: RetroLM) -> dict[str, Any]:
    """The options of `RetroConfig` that the method's results depend on, the budget aside."""
    fields = lm.method.config_fields
    left_out = (*_SPEED_ONLY, "kv_budget")
    ours = {
        key: value
        for key, value in asdict(lm.config).items()
        if key not in left_out and not (key in _LATER and value == _LATER[key])
    }
    return ours if fields is None else {key: ours[key] for key in fields}


def _load(lm: RetroLM, path: Path) -> PageRetriever:
    return load_retriever(path, lm.backbone.projection_shapes(), lm.backbone.fingerprint())


def retriever_digest(retriever: torch.nn.Module) -> str:
    """Hash of a retriever's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(retriever.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def adapter_name(model: Any) -> str | None:
    """Names of the adapters loaded into a model (transformers' own or PEFT's), or None."""
    return ", ".join(sorted(getattr(model, "peft_config", None) or {})) or None
