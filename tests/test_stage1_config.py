"""Stage-1 recipes: the committed ones load, the paper's say what the paper says, wrong ones are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retrolm.errors import UserError
from retrolm.training.stage1.config import Stage1TrainConfig, load_recipe

RECIPES = Path(__file__).parent.parent / "configs" / "stage1"
PAPER = ("mistral-7b-instruct-v0.2", "llama-3-8b-instruct")
PLAIN = '[data]\nweights = {{a = 1}}\n[[data.sources]]\nname = "a"\npath = "a"\nformat = "pooled"\n[train]\n{train}\n'


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_committed_recipes_load(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.toml")
    assert recipe.train.num_steps > 0 and sum(recipe.data.weights.values()) > 0
    assert recipe.decisive()["train"].keys() < recipe.as_dict()["train"].keys()


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_say_what_the_paper_says(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.toml")
    train, data = recipe.train, recipe.data
    assert (train.lr, train.weight_decay, train.rank, train.page_size) == (5e-6, 1e-2, 0, 128)
    assert train.accumulate == 8 * 16 and train.tokens_per_batch == data.max_tokens == 8000
    assert (train.loss, train.calibrate, train.learn_temperature) == ("info_nce", False, False)
    assert (data.min_hard_negatives, data.max_hard_negatives, data.paper_format) == (40, 40, 1.0)
    assert data.weights["msmarco"] / data.weights["slimpajama"] == 10
    assert sum(source.max_rows or 0 for source in data.sources) == 55_000
    assert train.num_steps * train.accumulate == pytest.approx(55_000, rel=0.01)  # once through the pairs


def test_paper_recipes_differ_in_the_backbone_alone() -> None:
    first, second = (load_recipe(RECIPES / f"{name}.toml") for name in PAPER)
    assert first.decisive() == second.decisive() and first.train.model != second.train.model


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ("", "names no model"),
        ('model = "m"\nrnak = 3', r"'rnak'.*Did you mean 'rank'"),
        ('model = "m"\nlr = "1e-3"', "lr must be a number, got '1e-3'"),
        ('model = "m"\nrank = 2.5', "rank must be a whole number"),
        ('model = "m"\nrank = true', "rank must be a whole number"),
        ('model = "m"\ncalibrate = 1', "calibrate must be true or false"),
        ('model = "m"\nrank = -1', "rank must not be negative"),
        ('model = "m"\nlr = 2', "lr must lie between 0 and 1"),
        ('model = "m"\nlr = nan', "lr must lie between 0 and 1"),
        ('model = "m"\nkl_share = 1.5', "kl_share must be a share"),
        ('model = "m"\nnum_steps = 0', "num_steps must be at least 1"),
        ('model = "m"\nloss = "mse"', r"loss='mse' is not a choice.*attention_kl"),
        ('model = "m"\ndtype = "float16"', r"dtype='float16' is not a choice"),
        ('model = "m"\npage_size = 100_000', r"page_size=100000 leaves no page to choose in texts of 16384 tokens"),
    ],
)
def test_wrong_values_are_refused(train: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(PLAIN.format(train=train))
    with pytest.raises(UserError, match=named) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[data]\n", "train = 3\ndata = 4", "[[[", "\x00"])
def test_broken_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(UserError, match="recipe"):
        load_recipe(path)
    with pytest.raises(UserError, match="Can't read"):
        load_recipe(tmp_path / "elsewhere.toml")


def test_overrides_come_last(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(PLAIN.format(train='model = "m"\nrank = 3'))
    changes: dict[str, Any] = {"rank": 5, "lr": 1}
    with pytest.raises(UserError, match="lr must lie"):
        load_recipe(path, changes)
    assert load_recipe(path, {"rank": 5}).train == Stage1TrainConfig("m", rank=5)


def test_overrides_reach_the_data_table(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(PLAIN.format(train='model = "m"'))
    data = load_recipe(path, {"data.weights.facts": 3, "data.min_tokens": 64, "data.weights.a": 0}).data
    assert data.weights == {"a": 0, "facts": 3} and data.min_tokens == 64
    for name, value, message in (
        ("data.seed.x", 1, "seed must be a whole number"),
        ("data.sources.x", 1, "'data.sources.x' can't be set: sources is no table"),
        ("data.seeed", 1, "Did you mean 'seed'"),
        ("data.max_keys", "many", "max_keys must be a whole number, got 'many'"),
        ("rank.x", 1, "rank must be a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe(path, {name: value})
