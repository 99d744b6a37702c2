"""A stage-2 recipe: the `[data]` and `[train]` tables of a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ...config import RetroConfig
from ...errors import UserError
from ..piece_config import FREE_OPTIONS, PieceDataConfig, PieceTrainConfig
from ..recipe import Recipe, build_table, read_recipe


@dataclass(frozen=True)
class Stage2TrainConfig(PieceTrainConfig):
    """How the backbone is trained.

    Attributes:
        retriever: folder, shipped name, "auto" or "none".
        attention: "sparse" = on retrieved pages; "full" = the stock model's own (the paper's fine-tuned control).
        weights: "lora" = an adapter, bookmark rows go past it; "full" = all weights, saved as a model with W^b written
            out beside it.
        kv_budget, page_size, num_local_pages, strict_budget, first_layer_mode: as in `RetroConfig`.
        causal_selection: choose a page's set with the bookmark before it, which knows none of its tokens (D22).
        detach_pages: keep gradients out of selected pages.
        train_retriever: let the page retriever learn from the loss too (D20 b; see `engine.page_pulls`), instead of
            keeping it as it is. retriever_lr: its peak learning rate.
    """

    retriever: str = "auto"
    attention: Literal["sparse", "full"] = "sparse"
    weights: Literal["lora", "full"] = "lora"
    kv_budget: int = 2048
    page_size: int = 128
    num_local_pages: int = 1
    strict_budget: bool = True
    first_layer_mode: Literal["recent", "mean_key", "full"] = "recent"
    causal_selection: bool = False
    detach_pages: bool = False
    train_retriever: bool = False
    retriever_lr: float = 3e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.retriever_lr < 1:
            raise UserError(f"retriever_lr must lie between 0 and 1, got {self.retriever_lr!r}.")
        if self.train_retriever and (self.attention == "full" or self.retriever == "none"):
            raise UserError(
                'train_retriever needs attention = "sparse" and a retriever to begin with. Set both, or leave it out.'
            )
        self.engine_config()

    def engine_config(self) -> RetroConfig:
        """How pages are cut and chosen."""
        names = {field.name for field in fields(RetroConfig)} & {field.name for field in fields(self)}
        return RetroConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Stage2Recipe(Recipe):
    """Everything a run depends on besides code, backbone, retriever and documents."""

    train: Stage2TrainConfig
    data: PieceDataConfig

    free_options = (*FREE_OPTIONS, "retriever")  # a fingerprint tells it, too


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Stage2Recipe:
    """Read a recipe; `overrides` replace keys of its `[train]` table.

    Raises:
        UserError: unreadable file, missing table, unknown or unusable key.
    """
    values, table = read_recipe(path, overrides)
    data = build_table(PieceDataConfig, table, "data option")
    return Stage2Recipe(build_table(Stage2TrainConfig, values, "training option"), data)
