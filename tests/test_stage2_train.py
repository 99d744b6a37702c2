"""Stage-2 runs: killed ones go on bit for bit, two processes train as one, what is saved is what was trained."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stage2_run_worker
from own_process import free_port, run_until
from retrolm.config import RetroConfig
from retrolm.engine.adapter import SMALL_WEIGHTS_FILE, WEIGHTS_FILE
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.retriever import WEIGHTS_FILE as RETRIEVER_FILE
from retrolm.retriever import read_card
from retrolm.training.document_pieces import PieceStream
from retrolm.training.run_log import LOG_FILE
from retrolm.training.stage2.artefact import RETRIEVER_FOLDER
from retrolm.training.stage2.config import Stage2TrainConfig, load_recipe
from retrolm.training.stage2.trainer import ADAPTER_FOLDER, MODEL_FOLDER
from stage2_run_maker import W, tiny_stage2_backbone, tiny_stage2_recipe, tiny_stage2_trainer, write_documents
from tiny_models import random_ids
from tiny_tokenizer import tiny_tokenizer

WORKER = Path(__file__).with_name("stage2_run_worker.py")
DATA_PARALLEL = Path(__file__).parents[1] / "configs" / "accelerate" / "data-parallel.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents"))


def weights(out: Path) -> bytes:
    return (out / ADAPTER_FOLDER / WEIGHTS_FILE).read_bytes()


def retriever_bytes(out: Path) -> bytes:
    return (out / RETRIEVER_FOLDER / RETRIEVER_FILE).read_bytes()


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in found]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(documents: Path, tmp_path: Path) -> None:
    """SIGKILL right after random steps, with a worker reading documents; checkpoints only at every other step.

    The same in stage 1, which writes its checkpoints by the same code, is part of `make test`.
    """
    settings = {"num_steps": 9, "log_every": 1, "save_every": 2, "num_workers": 1}
    assert tiny_stage2_trainer(tmp_path / "whole", documents, **settings).run()
    out = tmp_path / "killed"
    arguments = [str(documents), str(out), *(f"{key}={value}" for key, value in settings.items())]
    kills = (1, random.randrange(3, 8), None)
    ends = [run_until(stage2_run_worker.main, arguments, at) for at in kills]
    assert ends[0] == -signal.SIGKILL and ends[-1] == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert rows(out) == rows(tmp_path / "whole")


JOINT = {"train_retriever": True, "retriever_lr": 1e-2}


@pytest.mark.parametrize("changes", [{}, {"attention": "full"}, {"weights": "full", "lr": 1e-3}, JOINT])
def test_stopping_by_time_and_going_on(changes: dict[str, Any], documents: Path, tmp_path: Path) -> None:
    assert tiny_stage2_trainer(tmp_path / "whole", documents, dev_every=3, **changes).run()
    runs = 0
    while not tiny_stage2_trainer(tmp_path / "parts", documents, dev_every=3, **changes).run(True, 1e-9):
        runs += 1
    assert runs == 5
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    folder = MODEL_FOLDER if "weights" in changes else ADAPTER_FOLDER
    name = "model.safetensors" if "weights" in changes else WEIGHTS_FILE
    one, two = (load_file(tmp_path / part / folder / name) for part in ("whole", "parts"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    if "train_retriever" in changes:
        assert retriever_bytes(tmp_path / "parts") == retriever_bytes(tmp_path / "whole")


def test_two_processes_equal_one(documents: Path, tmp_path: Path) -> None:
    """By the configuration file that comes along, here on a CPU; the retriever is trained, too."""
    settings = {"lr": 1e-3, "accumulate": 4, "num_steps": 4, "log_every": 1, "dev_every": 2, "bits": 32}
    settings |= {"train_retriever": True, "retriever_lr": 1e-4}
    assert tiny_stage2_trainer(tmp_path / "one", documents, **settings).run()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DATA_PARALLEL)]
    launch += ["--main_process_port", str(free_port()), str(WORKER)]
    command = [
        *launch,
        str(documents),
        str(tmp_path / "two"),
        *(f"{key}={json.dumps(value)}" for key, value in settings.items()),
    ]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("processes 2") == 1
    for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert row == pytest.approx(other, abs=2e-4)
    parts = ((f"{ADAPTER_FOLDER}/{WEIGHTS_FILE}", 2e-5), (f"{RETRIEVER_FOLDER}/{RETRIEVER_FILE}", 2e-6))
    for part, most in parts:
        one, two = (load_file(tmp_path / name / part) for name in ("one", "two"))
        assert all(torch.allclose(value.float(), two[key].float(), rtol=0, atol=most) for key, value in one.items())


def test_a_step_trains_the_adapter_alone(documents: Path, tmp_path: Path) -> None:
    """The backbone, the retriever and what bookmarks choose keep their bits (D20; F7)."""
    lm = tiny_stage2_backbone()
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    kept = {name: value.clone() for name, value in lm.retriever.state_dict().items()}  # type: ignore[union-attr]
    trainer = tiny_stage2_trainer(tmp_path, documents, lm, num_steps=8, dev_every=8)
    at_first = trainer.dev_loss()
    assert trainer.run()
    assert trainer.dev_loss() < at_first  # type: ignore[operator]
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in lm.retriever.state_dict().items())  # type: ignore[union-attr]


def test_the_retriever_trains_with_the_adapter(documents: Path, tmp_path: Path) -> None:
    """All of it, at a rate of its own; what is saved beside the adapter is what was used, and tells of both."""
    lm, first = tiny_stage2_backbone(), tiny_stage2_backbone().retriever
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    trainer = tiny_stage2_trainer(tmp_path, documents, lm, num_steps=3, dev_every=3, bits=32, **JOINT)
    assert trainer.run() and lm.retriever is not None and first is not None
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    reached = {
        name for name, value in lm.retriever.named_parameters() if not torch.equal(value, first.get_parameter(name))
    }
    # No layer chooses by values of the last layer's bookmarks, whose rows end there.
    assert reached == set(first.state_dict()) - {"deltas.layers_2_v_proj.weight"}
    assert torch.equal(trainer.step_module.bookmark, lm.retriever.embedding)  # type: ignore[arg-type]
    assert trainer.retriever_folder == tmp_path / RETRIEVER_FOLDER
    ids, again = random_ids(150), tiny_stage2_backbone()
    again.use_adapter(trainer.artefact_folder)
    alone = again.logits(ids)
    again.use_retriever(trainer.retriever_folder)
    found, expected = again.logits(ids), lm.logits(ids)
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(alone, expected, atol=1e-2)
    card = read_card(trainer.retriever_folder)
    assert card.details["joint"]["step"] == 3 and card.details["joint"]["recipe"]["train"]["train_retriever"]
    assert card.details["before"] == first.card.details and card.name == "tiny-joint-retriever"


def test_a_rate_of_nothing_leaves_the_run_as_it_is(documents: Path, tmp_path: Path) -> None:
    """Training the retriever changes nothing else: with hardly any rate the adapter's numbers are those without."""
    assert tiny_stage2_trainer(tmp_path / "kept", documents).run()
    assert tiny_stage2_trainer(tmp_path / "joint", documents, train_retriever=True, retriever_lr=1e-30).run()
    assert weights(tmp_path / "kept") == weights(tmp_path / "joint")


def test_with_all_weights_the_retriever_that_is_saved_is_the_trained_one(documents: Path, tmp_path: Path) -> None:
    lm = tiny_stage2_backbone()
    trainer = tiny_stage2_trainer(tmp_path, documents, lm, weights="full", **{**JOINT, "lr": 1e-3})
    assert trainer.run() and trainer.retriever_folder is None and lm.retriever is not None
    folder = tmp_path / MODEL_FOLDER
    new = RetroLM.from_pretrained(folder, retriever=folder / "retriever", dtype="float32", kv_budget=5 * W, page_size=W)
    first, rows_in = tiny_stage2_backbone(), torch.randn(5, lm.backbone.hidden_size)
    assert first.retriever is not None and new.retriever is not None
    for layer in range(1, 3):
        attention = (x.backbone.layers[layer].attention.k_proj for x in (new, first))
        with torch.no_grad():
            found, expected = (torch.nn.functional.linear(rows_in, module.weight) for module in attention)
            before, trained, kept = (
                x.delta(layer, "k_proj", rows_in) for x in (first.retriever, lm.retriever, new.retriever)
            )
        assert float((found + kept - expected - trained).abs().max()) < 0.05 < float((trained - before).abs().max())


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_the_saved_adapter_is_the_trained_one(bits: int, documents: Path, tmp_path: Path) -> None:
    trainer = tiny_stage2_trainer(tmp_path, documents, bits=bits, num_steps=3)
    assert trainer.run()
    ids = random_ids(150)
    expected = trainer.lm.logits(ids)
    lm = tiny_stage2_backbone()
    plain = lm.logits(ids)
    lm.use_adapter(trainer.artefact_folder)
    error = float((lm.logits(ids) - expected).abs().max())
    moved = float((plain - expected).abs().max())
    assert error <= moved * {8: 0.1, 16: 0.03, 32: 1e-4}[bits]
    names = {path.name for path in trainer.artefact_folder.iterdir()}
    assert (SMALL_WEIGHTS_FILE if bits == 8 else WEIGHTS_FILE) in names and len(names) == 3
    card = json.loads((trainer.artefact_folder / "card.json").read_text())
    assert (
        card["details"]["step"] == 3 and card["details"]["bits"] == bits and card["backbone"]["model_type"] == "qwen2"
    )


def test_all_weights_come_with_w_b_written_out(documents: Path, tmp_path: Path) -> None:
    """Bookmark rows of the saved model project as they did before training, though the model's own weights moved."""
    old = tiny_stage2_backbone()
    trainer = tiny_stage2_trainer(tmp_path, documents, weights="full", lr=1e-3)
    assert trainer.run()
    rows_in = torch.randn(5, old.backbone.hidden_size)
    folder = tmp_path / MODEL_FOLDER
    new = RetroLM.from_pretrained(folder, retriever=folder / "retriever", dtype="float32", kv_budget=5 * W, page_size=W)
    for layer in range(3):
        for name in ("q_proj", "k_proj", "v_proj"):
            found, expected = (
                torch.nn.functional.linear(rows_in, getattr(lm.backbone.layers[layer].attention, name).weight)
                + lm.retriever.delta(layer, name, rows_in)  # type: ignore[union-attr]
                for lm in (new, old)
            )
            assert torch.allclose(found, expected, rtol=0, atol=0.05)
    ids = random_ids(150)
    assert not torch.allclose(new.logits(ids), old.logits(ids), atol=1e-2)
    program = trainer.step_module.program(150)
    with torch.no_grad(), trainer.step_module.running(program):
        trained = float(trainer.step_module(ids, program) / 149)
    saved = torch.nn.functional.cross_entropy(new.logits(ids)[:-1], ids[1:])
    assert float(saved) == pytest.approx(trained, abs=2e-3)


@pytest.mark.parametrize("options", [{}, {"attention": "full"}, JOINT], ids=str)
def test_all_weights_in_bfloat16_are_kept_in_float32(options: dict[str, Any], documents: Path, tmp_path: Path) -> None:
    """Small steps would be rounded away in bfloat16 weights (D25)."""
    changes = {"weights": "full", "dtype": "bfloat16", "lr": 1e-3, **options}
    trainer = tiny_stage2_trainer(tmp_path, documents, **changes)
    at_first = trainer.dev_loss()
    assert trainer.run()
    assert {p.dtype for p in trainer.step_module.parameters()} == {torch.float32}
    assert trainer.dev_loss() < at_first - 0.1  # type: ignore[operator]


def test_held_out_documents_are_never_trained_on(documents: Path, tmp_path: Path) -> None:
    trainer = tiny_stage2_trainer(tmp_path, documents, data={"epochs": 1, "min_tokens": 2})
    tokenizer = tiny_tokenizer()
    texts = [json.loads(line)["text"] for line in (documents / "held_out.jsonl").read_text().splitlines()]
    seen = "".join(tokenizer.decode(piece) for piece in trainer.batches())
    assert all(text[-20:] not in seen for text in texts) and "Chapter 3." in seen


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("stride", [1, 3])
def test_pieces_depend_on_their_number_alone(start: int, stride: int, documents: Path) -> None:
    config, tokenizer = tiny_stage2_recipe({"epochs": 2}).data, tiny_tokenizer()
    whole = list(PieceStream(config, tokenizer, documents))
    part = list(PieceStream(config, tokenizer, documents, start, stride))
    assert len(part) == len(whole[start::stride])
    assert all(torch.equal(a, b) for a, b in zip(part, whole[start::stride], strict=True))
    assert all(config.min_tokens <= len(piece) <= config.max_tokens for piece in whole)
    texts = [json.loads(line)["text"] for line in (documents / "books.jsonl").read_text().splitlines()]
    assert all(any(tokenizer.decode(piece) in text for text in texts) for piece in whole)


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        ({"path": ""}, {}, "either a path or a hub"),
        ({"min_tokens": 999}, {}, "min_tokens=999 exceeds"),
        ({}, {"attention": "dense"}, "attention='dense'"),
        ({}, {"lr": 2.0}, "lr must lie"),
        ({}, {"bits": 4}, "bits=4"),
        ({}, {"train_retriever": True, "attention": "full"}, "train_retriever needs attention"),
        ({}, {"train_retriever": True, "retriever": "none"}, "a retriever to begin with"),
        ({}, {"train_retriever": True, "retriever_lr": 1.0}, "retriever_lr must lie"),
        ({}, {"kv_budget": 20}, "kv_budget=20 is under 3 pages"),
        ({}, {"num_workers": 3}, "num_workers must be 0 or 1"),
    ],
)
def test_unusable_recipes_are_refused(data: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny_stage2_recipe(data, **changes)


def test_unusable_runs_are_refused(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The documents end at step"):
        tiny_stage2_trainer(tmp_path / "a", documents, data={"epochs": 1}, num_steps=500).run()
    with pytest.raises(UserError, match="exceeds the model's window of 1024"):
        tiny_stage2_trainer(tmp_path / "b", documents, data={"max_tokens": 2000}, attention="full")
    with pytest.raises(UserError, match="No page retriever comes with 'tiny'"):
        lm = tiny_stage2_backbone()
        lm.retriever = None
        tiny_stage2_trainer(tmp_path / "e", documents, lm, train_retriever=True)
    with pytest.raises(UserError, match="No document has 190 tokens"):
        (tmp_path / "books.jsonl").write_text('{"text": "Too short."}\n')
        tiny_stage2_trainer(tmp_path / "c", tmp_path, data={"min_tokens": 190, "dev_path": ""}).run()
    assert not tiny_stage2_trainer(tmp_path / "d", documents).run(stop_after_s=1e-9)
    with pytest.raises(UserError, match=r"data.max_tokens was 190 and is now 180"):
        tiny_stage2_trainer(tmp_path / "d", documents, data={"max_tokens": 180}).run(resume=True)
    with pytest.raises(UserError, match=r"backbone\.norm_digest"):
        tiny_stage2_trainer(tmp_path / "d", documents, tiny_stage2_backbone(seed=1)).run(resume=True)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.parent.glob("configs/stage2/*.toml")), ids=lambda p: p.name
)
def test_shipped_recipes_can_be_read(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe.train, Stage2TrainConfig) and recipe.data.dev_path
    assert recipe.train.engine_config() == RetroConfig(causal_selection=recipe.train.causal_selection)


def test_a_loss_that_is_no_number_ends_the_run_with_nothing_saved(documents: Path, tmp_path: Path) -> None:
    """Losses are looked at where they are logged and before anything is saved, whichever comes first."""
    trainer = tiny_stage2_trainer(tmp_path, documents, log_every=5)
    kept = trainer.update
    numbers = iter([1.0, 1.0, float("nan")])
    trainer.update = lambda pieces: (kept(pieces)[0] * next(numbers), None)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="loss is nan at step 2"):
        trainer.run()
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps == [1] and tiny_stage2_trainer(tmp_path, documents).run(resume=True)
