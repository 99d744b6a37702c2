"""A stage-1 recipe: the `[train]` table of a TOML file beside its `[data]` table."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...config import check_choices
from ...errors import UserError, unknown
from ..data.config import Stage1DataConfig, stage1_data_config


@dataclass(frozen=True)
class Stage1TrainConfig:
    """How the page retriever is trained.

    Attributes:
        model: backbone: folder, Hugging Face id or demo name.
        dtype: dtype of the frozen backbone; trained weights are float32 always.
        page_size: tokens per page.
        rank: rank of the W^b deltas; 0 = full matrices.
        init_from: folder of a retriever of the same backbone and rank to start from; "" = untrained.
        num_steps: optimiser steps. tokens_per_batch: text tokens of one forward pass at most.
        accumulate: forward passes per optimiser step, over all processes.
        lr: peak learning rate of the deltas; embedding_lr of the bookmark embedding.
        weight_decay, beta2, max_grad_norm: AdamW and clipping. Decay pulls W^b back to the backbone's own weights.
        warmup: share of the steps with rising rate. final_lr: share of the peak at the end (cosine in between).
        calibrate: scale each layer's scores to a standard deviation of 1 on the first batch, so that layers with
            large scores don't dominate the mean.
        learn_temperature: let each layer's scale be trained further (it changes no ranking).
        num_skip_layers: layers without a loss of their own, counted from the first (D7).
        seed: initial deltas.
        log_every, save_every, dev_every: steps between log lines, checkpoints and dev recall (0 = never).
        dev_samples: held-out samples per dev round. num_workers: processes that build samples.
    """

    model: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    page_size: int = 128
    rank: int = 48
    init_from: str = ""
    num_steps: int = 1000
    tokens_per_batch: int = 65536
    accumulate: int = 1
    lr: float = 5e-4
    embedding_lr: float = 1e-3
    weight_decay: float = 0.01
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    warmup: float = 0.03
    final_lr: float = 0.05
    calibrate: bool = True
    learn_temperature: bool = True
    num_skip_layers: int = 1
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    dev_every: int = 0
    dev_samples: int = 64
    num_workers: int = 2

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("page_size", "num_steps", "tokens_per_batch", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)!r}.")
        for name in ("rank", "num_skip_layers", "save_every", "dev_every", "num_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)!r}.")
        if not 0 < self.lr < 1:
            raise UserError(f"lr must lie between 0 and 1, got {self.lr!r}.")


@dataclass(frozen=True)
class Stage1Recipe:
    """Everything a run depends on besides code and data files."""

    train: Stage1TrainConfig
    data: Stage1DataConfig

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Stage1Recipe:
    """Read a recipe; `overrides` replace keys of its `[train]` table.

    Raises:
        UserError: unreadable file, missing table, unknown or unusable key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"Can't read the recipe {path}: {error}.") from None
    for table in ("data", "train"):
        if table not in content:
            raise UserError(f"The recipe {path} has no [{table}] table.")
    values = {**content["train"], **(overrides or {})}
    allowed = [field.name for field in dataclasses.fields(Stage1TrainConfig)]
    for key in values:
        if key not in allowed:
            raise unknown("training option", key, allowed)
    if "model" not in values:
        raise UserError(f"The [train] table of {path} names no model.")
    return Stage1Recipe(Stage1TrainConfig(**values), stage1_data_config(content["data"]))
