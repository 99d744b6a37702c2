"""All that changes a stored number, small enough to compare: weights, tokenizer, retriever, adapter, options."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.placement import weight_of
from ..errors import UserError

if TYPE_CHECKING:
    from ..engine.model import RetroLM

# Options that change where and how fast things are done, or only answers; all others change stored numbers.
NOT_STORED = frozenset(
    {
        "chunk_pages",
        "device_kv_bytes",
        "host_kv_bytes",
        "disk_folder",
        "retrieve_every",
        "agreement_layers",
        "word_weight",
        "whole_sentences",
    }
)
_SAMPLES = 64


def fingerprint(lm: RetroLM) -> dict[str, Any]:
    """What two engines must agree in to share stored pages; JSON types only.

    Raises:
        UserError: the engine has no tokenizer.
    """
    if lm.tokenizer is None or lm.format is None:
        raise UserError("A knowledge base needs a model with a tokenizer.")
    backbone = lm.backbone
    found = {
        "backbone": backbone.fingerprint(),
        "weights": _digest(_model_weights(lm.model)),
        "rope": backbone.config.rope_parameters,
        "tokenizer": _tokenizer_digest(lm.tokenizer),
        "prefix_ids": list(lm.format.prefix_ids),
        "retriever": _retriever(lm),
        "adapter": None if lm.adapter is None else _digest(lm.adapter.state_dict().items()),
        "dtype": _name(backbone.dtype),
        "stored_dtype": _name(lm.page_layout().dtype),
        "method": {"name": lm.method.name, **dataclasses.asdict(lm.method.knobs)},
    }
    options = {key: value for key, value in dataclasses.asdict(lm.config).items() if key not in NOT_STORED}
    del options["store_dtype"]  # what it comes to is in "stored_dtype"
    if options["page_positions"] != "true":
        options["page_positions"] = "compact"  # the others are read like this, and differ in how questions are asked
    plain: dict[str, Any] = json.loads(json.dumps(found | options))
    return plain


def _retriever(lm: RetroLM) -> dict[str, str] | None:
    if lm.retriever is None or not lm.method.needs_bookmarks:
        return None
    return {"name": lm.retriever.card.name, "weights": _digest(lm.retriever.state_dict().items())}


def _model_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        kept = [n for n, _ in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
        for name in [*(n for n, _ in module.named_parameters(recurse=False)), *kept]:
            yield f"{path}.{name}", weight_of(module, name)


def _digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, shapes and a few evenly spread numbers of each tensor: fine-tuning changes all of a matrix."""
    digest = hashlib.sha256()
    for name, value in weights:
        flat = value.detach().reshape(-1)
        step = max(len(flat) // _SAMPLES, 1)
        sample = flat[::step][: _SAMPLES + 1].to("cpu", torch.float64)
        digest.update(f"{name} {list(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
