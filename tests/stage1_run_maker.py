"""A tiny backbone, pool and recipe for training runs in a test, in this process or in others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import stage1_pool_maker
from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.training.data import Stage1Dataset, Stage1Sample
from retrolm.training.data.sample import FurtherQuestion
from retrolm.training.stage1.batches import Collate, Stage1Batch
from retrolm.training.stage1.config import Stage1Recipe, Stage1TrainConfig
from retrolm.training.stage1.trainer import Stage1Trainer
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

W = 32
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "dtype": "float32",
    "page_size": W,
    "rank": 3,
    "num_steps": 6,
    "tokens_per_batch": 800,
    "accumulate": 2,
    "log_every": 2,
    "save_every": 1,
    "dev_samples": 4,
    "num_workers": 0,
}
WEIGHTS = {"wiki": 2, "chat": 1, "facts": 1, "registers": 1, "cloze": 1}


def tiny_recipe(**changes: Any) -> Stage1Recipe:
    """A recipe for texts of 100 to 500 tokens; `changes` override its [train] table."""
    data = stage1_pool_maker.tiny_config(
        min_tokens=100, max_tokens=500, length_group=2, max_passage_tokens=60, max_keys=2, weights=WEIGHTS
    )
    return Stage1Recipe(Stage1TrainConfig(**{**SETTINGS, **changes}), data)


def tiny_backbone(name: str = "qwen2", dtype: torch.dtype = torch.float32) -> RetroLM:
    """A tiny chat model of 3 layers."""
    model = tiny_model(name, dtype=dtype, vocab_size=600, max_position_embeddings=1024, num_hidden_layers=3)
    return RetroLM(model, tiny_tokenizer(), config=RetroConfig(kv_budget=3 * W, page_size=W))


def tiny_trainer(out: Path, lm: RetroLM | None = None, **changes: Any) -> Stage1Trainer:
    """A trainer of the tiny recipe that writes to `out`."""
    return Stage1Trainer(tiny_recipe(**changes), lm or tiny_backbone(), stage1_pool_maker.tiny_pool(), out)


def tiny_batch(
    recipe: Stage1Recipe, first: int = 0, count: int = 3, length: int = 330, num_further: int = 0
) -> Stage1Batch:
    """`count` samples of one length as a batch; further questions are in the words of the next samples'."""
    config = dataclasses.replace(recipe.data, min_tokens=length, max_tokens=length)
    data = Stage1Dataset(stage1_pool_maker.tiny_pool(), tiny_tokenizer(), config, first + count + num_further)
    samples = [data[first + i] for i in range(count + num_further)]
    return Collate(W, pad_id=0)([_asked(samples[i : i + num_further + 1]) for i in range(count)])


def _asked(samples: list[Stage1Sample]) -> Stage1Sample:
    """The first sample, asked the others' questions as well."""
    own, *others = samples
    further = tuple(FurtherQuestion(other.question_ids, own.positive_spans) for other in others)
    return dataclasses.replace(own, further=further)
