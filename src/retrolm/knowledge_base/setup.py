"""How a base's engine was made, and making it again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .faults import DamagedBaseError

if TYPE_CHECKING:
    from ..engine.model import RetroLM
    from ..store import PageLayout

_OWN = ("retriever", "adapter", "method", "method_options", "chat", "dtype")


def new_engine(model: RetroLM | str | Path, options: dict[str, Any]) -> RetroLM:
    """The engine for a new base.

    Raises:
        UserError: options beside an engine, or a method that doesn't choose pages.
    """
    from ..engine.model import RetroLM
    from ..methods import PageMethod

    if isinstance(model, RetroLM) and options:
        raise UserError(f"An engine has its options already; leave out {', '.join(options)}.")
    lm = model if isinstance(model, RetroLM) else RetroLM.from_pretrained(model, **options)
    if not isinstance(lm.method, PageMethod):
        raise UserError(f"A knowledge base keeps pages, which method {lm.method.name!r} doesn't have.")
    return lm


def setup_of(lm: RetroLM, model: RetroLM | str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """What `load_engine` needs to make the engine again; JSON types only."""
    name = str(model) if isinstance(model, (str, Path)) else str(lm.model.name_or_path)
    own = {key: options.get(key) for key in _OWN if options.get(key) is not None}
    paths: dict[str, str | None] = {
        key: _absolute(str(value)) for key, value in own.items() if key in ("retriever", "adapter")
    }
    if "retriever" in options and options["retriever"] is None:
        paths["retriever"] = None  # untrained on purpose, where nothing said means "auto"
    return {
        "model": _absolute(name),
        "weights_folder": _weights_folder(name),
        **own,
        **paths,
        "dtype": str(lm.backbone.dtype).removeprefix("torch."),
        "method": lm.method.name,
        "method_options": dataclasses.asdict(lm.method.knobs),
        "options": dataclasses.asdict(lm.config),
    }


def load_engine(setup: dict[str, Any], model: RetroLM | str | Path | None) -> RetroLM:
    """The engine of a base; `model` is the engine itself or says where the model lies now."""
    from ..engine.model import RetroLM

    if isinstance(model, RetroLM):
        return model
    name, options = model or setup.get("model"), setup.get("options")
    if not isinstance(name, (str, Path)) or not isinstance(options, dict):
        raise DamagedBaseError("The manifest doesn't say with which model and options it was made. Make the base anew.")
    arguments = {key: setup[key] for key in _OWN if key in setup}
    return RetroLM.from_pretrained(name, **arguments, **options)


def described(layout: PageLayout) -> dict[str, Any]:
    """The shape of pages in words, for people and other programs."""
    return {
        "page_size": layout.page_size,
        "num_kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "bits": layout.bits,
    }


def _weights_folder(name: str) -> str:
    """Where the weights lie, so that they can be fetched early; "" if that isn't known."""
    from ..engine.pull import resolve_model

    try:
        folder = resolve_model(name)
    except UserError:
        return ""
    return str(Path(folder).absolute()) if Path(folder).is_dir() else ""


def _absolute(name: str) -> str:
    """A path that stays right in another folder; names of models are left as they are."""
    return str(Path(name).absolute()) if Path(name).exists() else name
