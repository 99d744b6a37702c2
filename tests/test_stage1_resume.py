"""Checkpoints: killed runs go on bit for bit, damaged or foreign ones are refused, nothing is half written."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import stage1_run_worker
from own_process import run_until
from retrolm.errors import UserError
from retrolm.retriever import WEIGHTS_FILE
from retrolm.training import checkpoint
from retrolm.training.checkpoint import CHECKPOINT_FILE, load_state
from retrolm.training.data import prepare_pool
from retrolm.training.run_log import LOG_FILE
from retrolm.training.stage1.trainer import Stage1Trainer
from stage1_pool_maker import tiny_pool, write_corpus
from stage1_run_maker import tiny_backbone, tiny_recipe, tiny_trainer
from tiny_tokenizer import tiny_tokenizer


def weights(out: Path) -> bytes:
    return (out / "retriever" / WEIGHTS_FILE).read_bytes()


def logged_steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / LOG_FILE).read_text().splitlines()]


def without_times(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]


def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL right after random steps, with 2 workers building samples; checkpoints only at every other step."""
    settings = ["num_workers=2", "num_steps=9", "log_every=1", "save_every=2"]
    out = tmp_path / "killed"
    arguments = [str(tiny_pool()), str(out), *settings]
    whole = [str(tiny_pool()), str(tmp_path / "whole"), *settings]  # in such a process too, with as many threads
    assert run_until(stage1_run_worker.main, whole, None) == 0
    kills = (1, random.randrange(3, 8), None)
    ends = [run_until(stage1_run_worker.main, arguments, kill_at) for kill_at in kills]
    assert ends[0] == -signal.SIGKILL and ends[-1] == 0 and set(ends) <= {0, -signal.SIGKILL}
    assert weights(out) == weights(tmp_path / "whole")
    assert without_times(out) == without_times(tmp_path / "whole")


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumed_in_process(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while a checkpoint is written: what stood there before is used."""
    assert tiny_trainer(tmp_path / "whole").run()
    whole = checkpoint.torch.save

    def fail(content: dict[str, Any], path: Path) -> None:
        whole(content, path)
        if content["step"] == stop:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path / "broken").run()
    monkeypatch.undo()
    state = load_state(tmp_path / "broken")
    assert (0 if state is None else state.step) == stop - 1
    assert tiny_trainer(tmp_path / "broken").run(resume=True)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_stopping_by_time_and_going_on(tmp_path: Path) -> None:
    assert tiny_trainer(tmp_path / "whole", save_every=0).run()
    runs = 0
    while not tiny_trainer(tmp_path / "parts", save_every=0).run(resume=True, stop_after_s=1e-9):
        runs += 1
    assert runs == 5  # one step each, the sixth ends the run
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert tiny_trainer(tmp_path / "parts", save_every=0).run(resume=True)  # nothing is left to do
    assert logged_steps(tmp_path / "parts") == [1, 2, 4, 6]


def test_a_new_run_doesnt_replace_a_checkpoint(tmp_path: Path) -> None:
    assert tiny_trainer(tmp_path, num_steps=1).run()
    before = weights(tmp_path)
    with pytest.raises(UserError, match=r"holds the checkpoint of another run.*--resume"):
        tiny_trainer(tmp_path, num_steps=1).run()
    assert weights(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 1e-2}, "train.lr was 0.0005 and is now 0.01"),
        ({"num_steps": 9, "rank": 2}, "train.num_steps was 6 and is now 9 and 1 more"),
        ({"loss": "mixed"}, "train.loss was 'info_nce' and is now 'mixed'"),
    ],
)
def test_another_recipe_is_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    assert not tiny_trainer(tmp_path).run(stop_after_s=1e-9)
    with pytest.raises(UserError, match=named):
        tiny_trainer(tmp_path, **changes).run(resume=True)


def test_another_backbone_and_pool_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert not tiny_trainer(out).run(stop_after_s=1e-9)
    with pytest.raises(UserError, match=r"backbone.model_type was 'qwen2' and is now 'llama'"):
        tiny_trainer(out, tiny_backbone("llama")).run(resume=True)
    write_corpus(tmp_path / "other", num_passages=90)
    prepare_pool(tiny_recipe().data, tiny_tokenizer(), tmp_path / "pool", tmp_path / "other")
    with pytest.raises(UserError, match="pool was"):
        Stage1Trainer(tiny_recipe(), tiny_backbone(), tmp_path / "pool", out).run(resume=True)


def test_what_changes_no_number_may_change(tmp_path: Path) -> None:
    assert tiny_trainer(tmp_path / "whole").run()
    assert not tiny_trainer(tmp_path / "run").run(stop_after_s=1e-9)
    free = {"num_workers": 1, "log_every": 1, "save_every": 3, "dev_every": 2, "model": "elsewhere/tiny"}
    assert tiny_trainer(tmp_path / "run", **free).run(resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_checkpoints_are_refused(content: bytes | None, tmp_path: Path) -> None:
    assert not tiny_trainer(tmp_path).run(stop_after_s=1e-9)
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(UserError, match=r"can't be read .* Delete it to start anew"):
        tiny_trainer(tmp_path).run(resume=True)


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    """It is read with weights_only: a pickle that would run something is refused."""
    torch.save({"step": print}, tmp_path / CHECKPOINT_FILE)
    with pytest.raises(UserError, match="can't be read"):
        load_state(tmp_path)


def test_a_log_cut_off_in_a_line_is_mended(tmp_path: Path) -> None:
    assert not tiny_trainer(tmp_path, log_every=1).run(stop_after_s=1e-9)
    log = tmp_path / LOG_FILE
    log.write_text(log.read_text() + '{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert tiny_trainer(tmp_path, log_every=1).run(resume=True)
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    with torch.no_grad():
        trainer.retriever.embedding.fill_(torch.nan)
    with pytest.raises(UserError, match=r"The loss is nan at step 0"):
        trainer.run()
    assert not (tmp_path / CHECKPOINT_FILE).exists()
