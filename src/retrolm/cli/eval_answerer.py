"""Who answers for the evaluation commands: this process, or shards on Ray."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .eval_options import run_provenance
from .loading import load_engine
from .options import EngineOptions

if TYPE_CHECKING:
    from ..evaluation.answering import Answerer, LocalAnswerer

RayOption = Annotated[
    str | None,
    typer.Option("--ray", help="Share samples out on Ray: a cluster's address, or local.", show_default="off"),
]
ShardsOption = Annotated[
    int | None,
    typer.Option("--shards", help="Models on Ray.", min=1, show_default="one per GPU, or per machine without any"),
]


@dataclass(frozen=True)
class AnswererOptions:
    """What an answering process is built from.

    Attributes:
        label: how the model is called in the rows. knobs: of methods, by method.
    """

    engine: EngineOptions
    label: str
    keep_pages: bool = False
    knobs: dict[str, dict[str, Any]] = field(default_factory=dict)


def open_answerer(options: AnswererOptions, ray: str | None, shards: int | None) -> AbstractContextManager[Answerer]:
    """What answers samples: this process, or shards on Ray; raises `UserError`."""
    provenance = run_provenance()
    if ray is None:
        if shards is not None:
            raise UserError("--shards needs --ray. For example: --ray local --shards 2.")
        return nullcontext(local_answerer(options, provenance["command"]))
    from ..evaluation.ray_shards import RayShards

    return RayShards(ray, functools.partial(local_answerer, options, provenance["command"]), provenance, shards)


def local_answerer(options: AnswererOptions, command_line: str) -> LocalAnswerer:
    """Load the model in this process; a shard on another machine states that machine in its rows."""
    from ..evaluation.adapters import AdapterLoader
    from ..evaluation.answering import LocalAnswerer

    lm = load_engine(options.engine)
    loader = AdapterLoader(lm, options.label, options.engine.config(), options.keep_pages, options.knobs)
    return LocalAnswerer(loader, {**run_provenance(), "command": command_line})


def bare_tokenizer(model: str) -> Any:
    """A model's tokenizer without the model."""
    from ..engine.quiet import silence_libraries
    from ..engine.tokenizer import load_tokenizer

    silence_libraries()
    return load_tokenizer(model)
