"""A dry run: the recipe's sizes on a random backbone, without model, tokenizer or pool."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cli_runner import run_cli
from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.training.stage1.backbone import without_head
from retrolm.training.stage1.dry_run import QUESTION_TOKENS, DryTrainer
from retrolm.training.stage1.speed import PARTS
from stage1_run_maker import tiny_recipe
from tiny_models import tiny_model

SHAPE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
}
RECIPES = Path(__file__).parent.parent / "configs" / "stage1"


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(SHAPE))
    return path


def test_batches_are_as_large_as_the_recipe_allows(shape: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(batch_negatives=1.0, tokens_per_batch=1600)
    trainer = DryTrainer(recipe, str(shape), torch.device("cpu"), tmp_path)
    batch = next(trainer.loaded())
    assert batch.pages.text_lengths.sum(1).tolist() == [recipe.data.max_tokens] * 3
    assert batch.pages.sizes.longest_question == QUESTION_TOKENS
    assert batch.positive_NP.any(1).all() and batch.rival_NM is not None
    start = trainer.retriever.state_dict()["embedding"].clone()
    trainer.update(trainer.reading(trainer.loaded()), more=False)
    assert not torch.equal(trainer.retriever.embedding, start)


def test_the_command_tells_time_and_memory(shape: Path) -> None:
    recipe = RECIPES / "llama-3-8b-instruct.toml"
    small = ("data.max_tokens=400", "data.min_tokens=400", "tokens_per_batch=800", "accumulate=1", "page_size=32")
    words = ["train", "speed", recipe, "--shape", shape, "--batches", 1, "--json"]
    done = run_cli(*words, *(part for setting in small for part in ("--set", setting)))
    assert done.code == 0 and tuple(done.json["parts"]) == PARTS and done.json["model"] == str(shape)
    assert "peak_device_bytes" in done.json["training"]
    run_cli(*words[:3]).refused_in_one_line("--pool", "--shape")
    run_cli(*words, "--pool", shape).refused_in_one_line("--pool", "--shape")
    run_cli(*words[:4], "no-such-shape").refused_in_one_line("no-such-shape")


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_only_a_head_of_its_own_is_dropped(name: str, tied: bool) -> None:
    model = tiny_model(name, tie_word_embeddings=tied)
    lm = RetroLM(without_head(model), config=RetroConfig(kv_budget=96, page_size=8))
    assert hasattr(lm.model.get_output_embeddings(), "weight") == tied
    assert lm.model.get_input_embeddings().weight.numel() > 0
