"""Columns of a comparison that differ in knobs and options, not in the method's name alone: "quest_retro,window=4"."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..config import RetroConfig
from ..engine.model import RetroLM
from ..errors import UserError, unknown
from ..methods import METHODS
from .variants import OpenVariant, Variant, VariantLoader

DEFAULT_COLUMNS = (
    "full",
    "quest",
    "quest_retro,window=2",
    "quest_retro,window=4",
    "quest_retro,window=8",
    "retrolm,retrieve_every=32",
    "retrolm_retro,retrieve_every=32,window=2",
)


@dataclass(frozen=True)
class Column:
    """A method with knobs of its own and options of `RetroConfig`."""

    method: str
    knobs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As it is written: the method and what is set."""
        return ",".join([self.method, *(f"{key}={value}" for key, value in {**self.knobs, **self.options}.items())])


def column_of(method: str, settings: dict[str, Any]) -> Column:
    """Tell knobs of the method from options of `RetroConfig`; raises `UserError` for what is neither."""
    knobs = {item.name for item in dataclasses.fields(METHODS.get(method).Knobs)}
    options = {item.name for item in dataclasses.fields(RetroConfig)} - {"kv_budget", "page_size"}
    for key in settings:
        if key not in knobs | options:
            raise unknown(f"knob or option of column {method!r}", key, sorted(knobs | options))
    column = Column(
        method,
        {key: value for key, value in settings.items() if key in knobs},
        {key: value for key, value in settings.items() if key not in knobs},
    )
    METHODS.get(method).with_options(column.knobs)
    return column


def with_full_first(columns: Sequence[Column]) -> list[Column]:
    """The columns, each once, full attention (which the others are held to) in front whether it was named or not."""
    found = {column.name: column for column in columns}
    full = found.pop("full", Column("full"))
    if any(METHODS.get(column.method).kind == "dense" for column in found.values()):
        raise UserError("Full attention has no settings. Write --method full.")
    return [full, *found.values()]


class ColumnOpener:
    """Opens columns around one loaded model, one at a time.

    Args:
        lm: a loaded engine; its model and tokenizer are used. model_name: for the rows.
        config: options of all columns. kv_budget: of those with a budget. retriever: as in `Variant`.
    """

    def __init__(self, lm: RetroLM, model_name: str, config: RetroConfig, kv_budget: int, retriever: str) -> None:
        self._lm = lm
        self._model_name = model_name
        self._config = config
        self._kv_budget = kv_budget
        self._retriever = retriever

    @contextmanager
    def open(self, column: Column) -> Iterator[OpenVariant]:
        """The column attached to the model while the block runs; raises `UserError` for what can't be opened."""
        kind, config = METHODS.get(column.method), self._config.replace(**column.options, kv_budget=self._kv_budget)
        variant = Variant(
            column.method,
            self._kv_budget if kind.has_budget else None,
            self._retriever if kind.needs_bookmarks else None,
        )
        opened = VariantLoader(self._lm, self._model_name, config, method_options={column.method: column.knobs}).open(
            variant
        )
        try:
            yield opened
        finally:
            opened.lm.detach()
