"""Landmark Attention's training: the loss is the model's by loops, runs go on bit for bit, what is saved is trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli_runner import run_cli
from landmark_run_maker import BETWEEN, tiny_landmark_backbone, tiny_landmark_recipe, tiny_landmark_trainer
from naive_landmark import naive_model_logits
from retrolm.engine.adapter import AdapterCard
from retrolm.engine.landmark_loss import LandmarkPass, landmark_losses
from retrolm.engine.landmark_rows import num_places, places_of_tokens, with_landmarks
from retrolm.engine.landmarks import load_landmarks, new_landmarks
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.training.landmark.config import load_recipe
from retrolm.training.run_log import LOG_FILE
from stage2_run_maker import write_documents
from tiny_folder import save_tiny_model
from tiny_models import random_ids, tiny_model

RECIPES = sorted((Path(__file__).parent.parent / "configs" / "landmark").glob("*.toml"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents"))


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in found]


def weights(out: Path) -> dict[str, torch.Tensor]:
    folder = out / "landmark"
    return load_file(folder / "landmark.safetensors") | load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("num_tokens", [1, 6, 7, 8, 20, 21])
def test_a_landmark_stands_behind_every_block(num_tokens: int) -> None:
    tokens = torch.arange(1.0, num_tokens + 1)[None, :, None]
    found = with_landmarks(tokens, torch.zeros(1), 7)[0, :, 0].tolist()
    expected = [value for t in range(num_tokens) for value in ([t + 1.0, 0.0] if t % 7 == 6 else [t + 1.0])]
    assert found == expected and len(found) == num_places(num_tokens, 7)
    assert [found[place] for place in places_of_tokens(num_tokens, 7)] == tokens.flatten().tolist()
    for cut in range(num_tokens):
        parts = [
            with_landmarks(tokens[:, :cut], torch.zeros(1), 7),
            with_landmarks(tokens[:, cut:], torch.zeros(1), 7, cut),
        ]
        assert torch.cat(parts, 1)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("name", ["llama", "llama-mha", "llama-mqa", "qwen3", "phi3"])
def test_the_loss_is_that_of_a_model_written_out(name: str) -> None:
    """Groups by loops in every layer; a token that begins a block is predicted at the landmark before it."""
    lm = RetroLM(tiny_model(name, num_hidden_layers=2), method="full")
    ids, landmark = random_ids(19), torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), lm.attachment.run(LandmarkPass(4)):
        found = landmark_losses(lm.backbone, ids[None], landmark, 4, chunk=5)
    logits = naive_model_logits(lm.backbone, ids, landmark, 4)
    before = [t + t // 4 - 1 for t in range(1, 19)]
    expected = torch.nn.functional.cross_entropy(logits[before], ids[1:], reduction="none")
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_differences(checkpointing: bool, documents: Path, tmp_path: Path) -> None:
    """Of the whole step, by moving one number of the embedding and of the adapter."""
    lm = RetroLM(tiny_model("llama", num_hidden_layers=2, vocab_size=600), method="full")
    trainer = tiny_landmark_trainer(
        tmp_path, documents, lm, {"dev_path": ""}, checkpointing=checkpointing, dtype="float32"
    )
    step = trainer.step_module.double()
    pieces = random_ids(40).view(2, 20)
    program = step.program(20)
    for parameter in (step.landmarks.embedding, step.landmarks.adapter.pairs[0].up):
        with step.running(program):
            (grad,) = torch.autograd.grad(step(pieces, program), parameter)
        with torch.no_grad(), step.running(program):
            ends = []
            for shift in (1e-3, -2e-3):
                parameter.view(-1)[3] += shift
                ends.append(float(step(pieces, program)))
            parameter.view(-1)[3] += 1e-3
        assert float(grad.view(-1)[3]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=3e-3)


def test_training_lowers_the_held_out_loss_and_leaves_the_backbone(documents: Path, tmp_path: Path) -> None:
    lm = tiny_landmark_backbone()
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    trainer = tiny_landmark_trainer(tmp_path, documents, lm, num_steps=8, dev_every=8)
    at_first, embedding = trainer.dev_loss(), trainer.step_module.landmarks.embedding.detach().clone()
    assert trainer.run()
    assert trainer.dev_loss() < at_first - 0.1  # type: ignore[operator]
    assert not torch.allclose(trainer.step_module.landmarks.embedding, embedding, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


def test_stopping_by_time_and_going_on(documents: Path, tmp_path: Path) -> None:
    assert tiny_landmark_trainer(tmp_path / "whole", documents, dev_every=3).run()
    runs = 0
    while not tiny_landmark_trainer(tmp_path / "parts", documents, dev_every=3).run(True, 1e-9):
        runs += 1
    assert runs == 5 and rows(tmp_path / "parts") == rows(tmp_path / "whole")
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_pieces_side_by_side_are_as_good_as_one_after_the_other(documents: Path, tmp_path: Path) -> None:
    assert tiny_landmark_trainer(tmp_path / "wide", documents, batch=4, accumulate=1, lr=1e-3).run()
    assert tiny_landmark_trainer(tmp_path / "long", documents, batch=1, accumulate=4, lr=1e-3).run()
    one, two = rows(tmp_path / "wide"), rows(tmp_path / "long")
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-3)


def test_what_is_saved_is_what_was_trained(documents: Path, tmp_path: Path) -> None:
    trainer = tiny_landmark_trainer(tmp_path, documents, bits=32, num_steps=3)
    assert trainer.run()
    other = tiny_landmark_backbone()
    found = load_landmarks(trainer.artefact_folder, other.backbone)
    assert (found.num_between, found.context) == (BETWEEN, 60 + 60 // BETWEEN)
    assert found.card.details["step"] == 3 and math.isfinite(found.card.details["tokens"])
    assert found.card.details["recipe"]["train"]["num_between"] == BETWEEN
    trained = trainer.step_module.landmarks
    assert torch.equal(found.embedding, trained.embedding)
    pairs = [dict(zip(one.adapter.paths, one.adapter.pairs, strict=True)) for one in (found, trained)]
    assert pairs[0].keys() == pairs[1].keys()
    for path, pair in pairs[0].items():
        assert all(torch.equal(x, y) for x, y in zip(pair.parameters(), pairs[1][path].parameters(), strict=True))


def test_what_can_not_be_used_is_refused(documents: Path, tmp_path: Path) -> None:
    lm = tiny_landmark_backbone()
    with pytest.raises(UserError, match="holds no landmarks"):
        load_landmarks(tmp_path, lm.backbone)
    start_E, card = lm.untrained_bookmark(), AdapterCard(lm.backbone.fingerprint())
    new_landmarks(lm.backbone, start_E, "all", 2, 4.0, card).save(tmp_path / "bare", 32)
    with pytest.raises(UserError, match="can't be read"):
        load_landmarks(tmp_path / "bare", lm.backbone)
    assert tiny_landmark_trainer(tmp_path / "run", documents, num_steps=1).run()
    with pytest.raises(UserError, match=r"trained for another backbone \(norm_digest"):
        load_landmarks(tmp_path / "run" / "landmark", tiny_landmark_backbone(seed=1).backbone)
    with pytest.raises(UserError, match=r"belongs to another run: train\.num_between was 7"):
        tiny_landmark_trainer(tmp_path / "run", documents, num_between=8).run(resume=True)
    for name, said in (("mistral-sliding", "this model's slide"), ("gemma2", "this model's slide")):
        with pytest.raises(UserError, match=said):
            tiny_landmark_trainer(tmp_path / "x", documents, RetroLM(tiny_model(name), method="full"))
    with pytest.raises(UserError, match="take 1142 positions"):
        tiny_landmark_trainer(tmp_path / "x", documents, data={"min_tokens": 1000, "max_tokens": 1000})


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        ({"min_tokens": 50}, {}, "must be equal"),
        ({}, {"num_between": 60}, "holds no block"),
        ({}, {"batch": 0}, "batch must be at least 1"),
        ({}, {"lr": 2.0}, "lr must lie"),
    ],
)
def test_unusable_recipes_are_refused(data: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny_landmark_recipe(data, **changes)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_can_be_read(path: Path) -> None:
    assert load_recipe(path).data.dev_path


def test_train_on_the_command_line(documents: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    train = {"model": str(model), "dtype": "float32", "num_between": 7, "batch": 2, "num_steps": 2, "rank": 2}
    train |= {"num_workers": 0, "dev_every": 2, "accumulate": 1}
    data = {"path": "books.jsonl", "dev_path": "held_out.jsonl", "max_tokens": 60, "min_tokens": 60, "dev_pieces": 2}
    lines = [f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
             for name, table in (("data", data), ("train", train))]  # fmt: skip
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    words = ["train", "landmark", tmp_path / "recipe.toml", "--data-root", documents, "--out", tmp_path / "run"]
    done = run_cli(*words)
    assert done.code == 0 and "Landmarks:" in done.out and "held-out loss" in done.err
    assert (tmp_path / "run" / "landmark" / "landmark.safetensors").is_file()
    run_cli(*words).refused_in_one_line("holds the checkpoint of another run")
    run_cli(*words, "--set", "num_betwen=8").refused_in_one_line("Did you mean 'num_between'")
