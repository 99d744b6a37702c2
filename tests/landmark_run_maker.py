"""A tiny backbone, recipe and trainer of Landmark Attention for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrolm.engine.model import RetroLM
from retrolm.training.landmark.config import LandmarkRecipe, LandmarkTrainConfig
from retrolm.training.landmark.trainer import LandmarkTrainer
from retrolm.training.piece_config import PieceDataConfig
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

BETWEEN = 7
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "dtype": "float32",
    "num_between": BETWEEN,
    "batch": 2,
    "rank": 3,
    "num_steps": 6,
    "accumulate": 2,
    "lr": 1e-2,
    "loss_chunk": 50,
    "log_every": 2,
    "save_every": 1,
    "num_workers": 0,
}
DATA: dict[str, Any] = {
    "path": "books.jsonl",
    "dev_path": "held_out.jsonl",
    "max_tokens": 60,
    "min_tokens": 60,
    "interleave": 3,
    "dev_pieces": 3,
}


def tiny_landmark_recipe(data: dict[str, Any] | None = None, **changes: Any) -> LandmarkRecipe:
    """A recipe for pieces of 60 tokens; `changes` override its [train] table, `data` its [data] table."""
    return LandmarkRecipe(LandmarkTrainConfig(**{**SETTINGS, **changes}), PieceDataConfig(**{**DATA, **(data or {})}))


def tiny_landmark_backbone(name: str = "llama", seed: int = 0) -> RetroLM:
    """A tiny chat model of 3 layers."""
    model = tiny_model(name, seed, vocab_size=600, max_position_embeddings=1024, num_hidden_layers=3).float()
    return RetroLM(model, tiny_tokenizer(), method="full")


def tiny_landmark_trainer(
    out: Path, documents: Path, lm: RetroLM | None = None, data: dict[str, Any] | None = None, **changes: Any
) -> LandmarkTrainer:
    """A trainer of the tiny recipe that writes to `out`."""
    return LandmarkTrainer(tiny_landmark_recipe(data, **changes), lm or tiny_landmark_backbone(), documents, out)
