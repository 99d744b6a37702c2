"""A tiny backbone, documents and recipe for stage-2 runs in a test, in this process or in others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.training.piece_config import PieceDataConfig
from retrolm.training.stage2.config import Stage2Recipe, Stage2TrainConfig
from retrolm.training.stage2.trainer import Stage2Trainer
from test_against_naive import random_retriever
from tiny_models import tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

W = 16
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "dtype": "float32",
    "page_size": W,
    "kv_budget": 5 * W,
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
    "max_tokens": 190,
    "min_tokens": 60,
    "interleave": 3,
    "dev_pieces": 3,
}


def write_documents(folder: Path) -> Path:
    """Ten documents of 110 to 1100 tokens to train on, two held out; one of these is also among the first."""
    folder.mkdir(parents=True, exist_ok=True)
    words = STORY.split()
    texts = [" ".join(words[n:] + words[:n]) + f" Chapter {n}. " for n in range(12)]
    texts = [text * (n % 9 + 1) for n, text in enumerate(texts)]
    for name, part in (("books.jsonl", texts[:10]), ("held_out.jsonl", texts[9:])):
        rows = [json.dumps({"title": f"{name} {n}", "text": text}) for n, text in enumerate(part)]
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def tiny_stage2_recipe(data: dict[str, Any] | None = None, **changes: Any) -> Stage2Recipe:
    """A recipe for pieces of 190 tokens; `changes` override its [train] table, `data` its [data] table."""
    return Stage2Recipe(Stage2TrainConfig(**{**SETTINGS, **changes}), PieceDataConfig(**{**DATA, **(data or {})}))


def tiny_stage2_backbone(name: str = "qwen2", seed: int = 0) -> RetroLM:
    """A tiny chat model of 3 layers with a random retriever."""
    model = tiny_model(name, seed, torch.float32, vocab_size=600, max_position_embeddings=1024, num_hidden_layers=3)
    lm = RetroLM(model, tiny_tokenizer(), config=RetroConfig(kv_budget=5 * W, page_size=W))
    lm.use_retriever(random_retriever(lm, 0).float())
    return lm


def tiny_stage2_trainer(
    out: Path, documents: Path, lm: RetroLM | None = None, data: dict[str, Any] | None = None, **changes: Any
) -> Stage2Trainer:
    """A trainer of the tiny recipe that writes to `out`."""
    return Stage2Trainer(tiny_stage2_recipe(data, **changes), lm or tiny_stage2_backbone(), documents, out)
