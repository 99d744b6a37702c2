"""Several processes train as one does: two on the CPU against one with accumulation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stage1_run_worker
from own_process import free_port, printed, start
from retrolm.errors import UserError
from retrolm.retriever import WEIGHTS_FILE
from retrolm.training.checkpoint import load_state
from retrolm.training.processes import own_share
from stage1_pool_maker import tiny_pool
from stage1_run_maker import tiny_trainer
from test_stage1_resume import without_times

# A low rate: AdamW's first steps divide a gradient by itself, which blows up the rounding of the smallest ones.
SETTINGS = {"lr": 1e-4, "accumulate": 4, "num_steps": 4, "log_every": 1, "dev_every": 2, "dev_samples": 6}


def run_two(out: Path) -> str:
    """Train with two processes, told apart as torchrun does it; returns what they print."""
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        start(stage1_run_worker.main, str(tiny_pool()), str(out), *settings, environment={**group, **own})
        for own in ({"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"} for rank in "01")
    ]
    return "".join(printed(*process) for process in started)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    assert tiny_trainer(tmp_path / "one", **SETTINGS).run()
    printed = run_two(tmp_path / "two")
    assert printed.count("processes 2") == 1 and printed.split().count("4") == 2  # the main process alone speaks
    one, two = (load_file(tmp_path / name / "retriever" / WEIGHTS_FILE) for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=0, atol=1e-6), name
    for row, other in zip(*(without_times(tmp_path / name) for name in ("one", "two")), strict=True):
        assert row.keys() == other.keys() and row["step"] == other["step"]
        if "loss" in row:
            assert row == pytest.approx(other, abs=2e-4)
    states = [load_state(tmp_path / name) for name in ("one", "two")]
    assert states[0] is not None and states[1] is not None and states[0].tokens == states[1].tokens


def test_accumulation_has_to_be_shared_evenly() -> None:
    assert own_share(6, 3) == 2
    with pytest.raises(UserError, match=r"accumulate=3 .* 2 processes.*--set accumulate=2"):
        own_share(3, 2)
