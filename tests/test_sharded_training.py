"""Training on a backbone that two processes share by FSDP2 equals training by one process that holds it all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli_runner import run_cli
from own_process import free_port
from retrolm.engine.model import RetroLM
from retrolm.engine.sharding import shard_layers
from retrolm.errors import UserError
from retrolm.training import processes
from retrolm.training.processes import backbone_place, new_accelerator
from retrolm.training.run_log import LOG_FILE
from retrolm.training.stage1 import backbone as stage1
from retrolm.training.stage2 import backbone as stage2
from sharded_run_maker import RUNS
from stage1_pool_maker import tiny_pool
from stage1_run_maker import tiny_backbone, tiny_recipe
from stage2_run_maker import tiny_stage2_recipe, write_documents
from test_against_naive import W, random_retriever
from tiny_folder import save_tiny_model

WORKER = Path(__file__).with_name("sharded_run_worker.py")
CONFIGS = Path(__file__).parents[1] / "configs"
SHARDED = CONFIGS / "accelerate" / "fsdp2.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a retriever for it, a pool and documents."""
    folder = write_documents(tmp_path_factory.mktemp("sharded"))
    model = save_tiny_model(folder / "model", tie_word_embeddings=True, attention_bias=True)
    lm = RetroLM.from_pretrained(model, retriever=None, dtype="float32", kv_budget=5 * W, page_size=W)
    random_retriever(lm, 0).float().save(folder / "retriever")
    shutil.copytree(tiny_pool(), folder / "pool")
    return folder


def launch(folder: Path, out: Path, **changes: str) -> Path:
    """What two processes write, by the configuration file that comes along."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(SHARDED)]
    command += ["--main_process_port", str(free_port()), str(WORKER), str(folder), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def launched(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote on a CPU."""
    environment = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return launch(folder, tmp_path_factory.mktemp("launched"), **environment)


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_s", "dev_recall")} for row in found]


def recalls(out: Path) -> list[Any]:
    return [
        row["dev_recall"]
        for line in (out / LOG_FILE).read_text().splitlines()
        if "dev_recall" in (row := json.loads(line))
    ]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    files = sorted(out.rglob("*.safetensors"))
    assert files
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def same(one: Path, two: Path, most: float) -> None:
    """The same artefact, whole, and the same log."""
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=0, atol=most), name
    for row, other in zip(rows(one), rows(two), strict=True):
        assert row == pytest.approx(other, abs=2e-4)
    assert recalls(one) == recalls(two)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_that_share_a_backbone_equal_one(name: str, folder: Path, launched: Path, tmp_path: Path) -> None:
    held = [float((launched / f"{name}.{process}").read_text()) for process in range(2)]
    # A pass of stage 1 ends within the last of three layers, which stays whole then.
    assert held == pytest.approx([2 / 3 if name == "stage1" else 1 / 2] * 2)
    assert RUNS[name](folder, tmp_path).run()
    same(tmp_path, launched / "whole" / name, 2e-6)
    same(launched / "parts" / name, launched / "whole" / name, 0)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_matmul")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_that_share_a_backbone_equal_one(folder: Path, tmp_path: Path) -> None:
    out = launch(folder, tmp_path / "two")
    for name in RUNS:
        assert RUNS[name](folder, tmp_path / name).run()
        same(tmp_path / name, out / "whole" / name, 1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_the_checkpoint_of_a_sharded_run_is_whole(name: str, folder: Path, launched: Path) -> None:
    """One process, which holds everything, goes on from it to the same end."""
    assert len(rows(launched / "alone" / name)) == 1
    assert RUNS[name](folder, launched / "alone" / name).run(resume=True)
    same(launched / "alone" / name, launched / "whole" / name, 2e-6)


LAUNCHES = [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "under DeepSpeed isn't supported"),
    ({"ACCELERATE_USE_FSDP": "true"}, "under FSDP 1 isn't supported"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
]


@pytest.mark.parametrize(("environment", "said"), LAUNCHES)
@pytest.mark.parametrize("stage", RUNS)
def test_other_launches_are_refused(
    stage: str, environment: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded, with what to do instead."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    recipe = CONFIGS / stage / "smollm2-135m.toml"
    data = "--pool" if stage == "stage1" else "--data-root"
    found = run_cli("train", stage, recipe, data, tmp_path, "--out", tmp_path / "out")
    found.refused_in_one_line(said, "configs/accelerate/fsdp2.yaml")


def test_one_process_holds_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert backbone_place() is None


def test_what_needs_a_whole_backbone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_backbone()
    monkeypatch.setattr(processes, "_shards", lambda state: True)
    with pytest.raises(UserError, match="shard the backbone, which is whole"):
        new_accelerator(lm, (), tmp_path, find_unused=False)
    monkeypatch.setattr(processes, "is_sharded", lambda model: True)
    for option in ({"encode": "streaming"}, {"bookmarks": "visible"}):
        with pytest.raises(UserError, match=f"{next(iter(option))}='.*' doesn't work .*data-parallel.yaml"):
            stage1.check_sharing(tiny_recipe(**option), lm)
    for changes, said in (({"weights": "full"}, "weights = "), ({"train_retriever": True}, "train_retriever")):
        with pytest.raises(UserError, match=f"{said}.* doesn't work .*data-parallel.yaml"):
            stage2.check_sharing(tiny_stage2_recipe(**changes), lm)


def test_quantised_weights_are_not_sharded() -> None:
    lm = tiny_backbone()
    lm.model.is_quantized = True
    with pytest.raises(UserError, match="quantised backbone can't be sharded"):
        shard_layers(lm.model, None, lm.device)  # type: ignore[arg-type]
