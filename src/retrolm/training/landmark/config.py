"""A recipe of Landmark Attention: the `[data]` and `[train]` tables of a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..piece_config import FREE_OPTIONS, PieceDataConfig, PieceTrainConfig
from ..recipe import Recipe, build_table, read_recipe


@dataclass(frozen=True)
class LandmarkTrainConfig(PieceTrainConfig):
    """How landmarks and adapter are trained.

    Attributes:
        num_between: tokens between landmarks. batch: pieces side by side in a forward pass.
    """

    num_between: int = 50
    batch: int = 16
    checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_between", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class LandmarkRecipe(Recipe):
    """Everything a run depends on besides code, backbone and documents."""

    train: LandmarkTrainConfig
    data: PieceDataConfig

    free_options = FREE_OPTIONS

    def __post_init__(self) -> None:
        if self.data.min_tokens != self.data.max_tokens:
            raise UserError(
                f"min_tokens={self.data.min_tokens} and max_tokens={self.data.max_tokens} must be equal: pieces are "
                "read side by side."
            )
        if self.data.max_tokens <= self.train.num_between:
            raise UserError(
                f"max_tokens={self.data.max_tokens} holds no block of num_between={self.train.num_between} tokens and "
                "what comes behind it. Raise max_tokens."
            )


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> LandmarkRecipe:
    """Read a recipe; `overrides` replace keys of its `[train]` table.

    Raises:
        UserError: unreadable file, missing table, unknown or unusable key.
    """
    values, table = read_recipe(path, overrides)
    data = build_table(PieceDataConfig, table, "data option")
    return LandmarkRecipe(build_table(LandmarkTrainConfig, values, "training option"), data)
