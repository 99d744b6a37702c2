"""The runner: each sample answered once whatever happens, broken ones counted, rows with stable keys."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from own_process import start
from retrolm.errors import UserError
from retrolm.evaluation.answering import attempt
from retrolm.evaluation.journal import Journal, read_lines, write_whole
from retrolm.evaluation.readers import Prediction, RetroReader
from retrolm.evaluation.rows import cells_of, sample_key
from retrolm.evaluation.runner import CELLS_FILE, SAMPLES_FILE, Runner, batches
from retrolm.evaluation.tasks import EvalSample
from retrolm.evaluation.variants import Variant, VariantLoader, variants_of
from retrolm.methods import BudgetError
from tiny_eval import CONFIG, VARIANTS, run_stories, story_sample, story_set, tiny_answerer, tiny_lm

SAMPLE_KEYS = {
    *("key", "config_hash", "sample_id", "task", "length", "model", "retriever", "adapter", "method", "kv_budget"),
    *("attended_tokens", "score", "failed", "prediction", "answers", "num_tokens", "num_generated", "labels"),
    *("ttft_s", "tpot_s", "total_s", "peak_device_bytes", "peak_host_bytes", "seed", "beyond_window", "batch_size"),
    *("commit", "versions", "hardware", "command", "measured_at", "prefill", "dtype", "metric", "extra_scores"),
}
CELL_KEYS = {
    *("task", "length", "model", "retriever", "adapter", "method", "kv_budget", "attended_tokens", "score", "score_ci"),
    *("num_samples", "num_failed", "ttft_s", "tpot_s", "total_s", "peak_device_bytes", "peak_host_bytes", "seed"),
    *("commit", "versions", "hardware", "config_hash", "command", "beyond_window"),
}
RESULT = ("key", "score", "prediction", "num_generated")


def rows_of(out: Path) -> list[dict[str, Any]]:
    return list(read_lines(out / SAMPLES_FILE))


def results(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return sorted(tuple(str(row[key]) for key in RESULT) for row in rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was never disturbed."""
    out: Path = tmp_path_factory.mktemp("whole")
    run_stories(out)
    return out


def test_rows_and_cells_have_the_promised_keys(whole: Path) -> None:
    rows, cells = rows_of(whole), list(read_lines(whole / CELLS_FILE))
    assert len(rows) == 15 and len(cells) == 3
    assert all(set(row) >= SAMPLE_KEYS for row in rows)
    assert all(set(cell) >= CELL_KEYS for cell in cells)
    for cell in cells:
        own = [row["score"] for row in rows if row["config_hash"] == cell["config_hash"]]
        assert cell["score"] == pytest.approx(sum(own) / 5)
        assert cell["score_ci"][0] <= cell["score"] <= cell["score_ci"][1]
    assert [cell["kv_budget"] for cell in cells] == [None, 64, 64]
    assert [cell["retriever"] for cell in cells] == [None, None, "untrained"]


def test_batches_change_nothing_but_time(whole: Path, tmp_path: Path) -> None:
    run_stories(tmp_path, batch_size=3)
    assert results(rows_of(tmp_path)) == results(rows_of(whole))


def test_a_second_run_answers_nothing_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (whole / SAMPLES_FILE).read_bytes()
    monkeypatch.setattr(RetroReader, "answer", None)
    assert len(run_stories(whole)) == 3
    assert (whole / SAMPLES_FILE).read_bytes() == before


def test_more_samples_extend_a_cell(tmp_path: Path) -> None:
    run_stories(tmp_path, num_samples=2, variants=VARIANTS[1:2])
    (cell,) = run_stories(tmp_path, num_samples=4, variants=VARIANTS[1:2])
    assert cell["num_samples"] == 4 and len(rows_of(tmp_path)) == 4


def test_killed_at_random_points_no_sample_is_lost_or_repeated(whole: Path, tmp_path: Path) -> None:
    rng, kills = random.Random(5), 0
    path = tmp_path / SAMPLES_FILE
    for _ in range(20):
        worker, _pipe = start(run_stories, tmp_path)
        if not _killed(worker, path, _num_lines(path) + rng.randint(1, 4), rng.random() * 0.02):
            break
        kills += 1
    assert worker.exitcode == 0 and kills >= 3
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 15
    assert results(rows) == results(rows_of(whole))
    assert len(list(read_lines(tmp_path / CELLS_FILE))) == 3


def _killed(worker: Any, path: Path, num_lines: int, delay: float) -> bool:
    """Kill `worker` a moment after the file has `num_lines`; False if it ended by itself."""
    while worker.is_alive():
        if _num_lines(path) >= num_lines:
            time.sleep(delay)
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    worker.join()
    return bool(worker.exitcode == -signal.SIGKILL)


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400))
def test_a_torn_last_line_is_repaired_wherever_it_tore(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "rows.jsonl"
    with Journal(path) as journal:
        for number in range(8):
            journal.append({"key": str(number), "text": "é\n" * number})
    data = path.read_bytes()[: -cut or None]
    path.write_bytes(data)
    with Journal(path) as journal:
        kept = len(journal.rows)
        assert kept == data.count(b"\n")
        journal.append({"key": "new"})
    assert [row["key"] for row in read_lines(path)] == [*map(str, range(kept)), "new"]


def test_a_broken_line_inside_is_named_and_a_folder_in_use_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "1"}\n{"key": \n{"key": "2"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        Journal(path)
    path.write_text("", encoding="utf-8")
    with Journal(path), pytest.raises(UserError, match="in use by another run"):
        Journal(path)


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


class Breaks:
    """A reader that breaks on one sample, alone or in a batch."""

    def answer(self, samples: Sequence[EvalSample]) -> list[Prediction]:
        if any(sample.sample_id == "1" for sample in samples):
            raise RuntimeError("out of\nluck")
        return [Prediction("e", 9, 1, False, {"prefill": 9, "decode": 9}, 0.1, 0.1) for _ in samples]


def test_a_broken_sample_is_recorded_counted_and_scored_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetroReader, "answer", Breaks.answer)
    (cell,) = run_stories(tmp_path, variants=VARIANTS[1:2], batch_size=3)
    assert (cell["num_samples"], cell["num_failed"], cell["score"]) == (5, 1, 0.8)
    (broken,) = [row for row in rows_of(tmp_path) if row["failed"]]
    assert (broken["error"], broken["score"], broken["sample_id"]) == ("RuntimeError: out of luck", 0.0, "1")
    monkeypatch.undo()
    assert run_stories(tmp_path, variants=VARIANTS[1:2])[0]["num_failed"] == 1
    (mended,) = run_stories(tmp_path, variants=VARIANTS[1:2], retry_failed=True)
    assert (mended["num_samples"], mended["num_failed"]) == (5, 0)


def test_going_over_budget_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: RetroReader, samples: Sequence[EvalSample]) -> list[Prediction]:
        raise BudgetError("too much")

    assert attempt(Breaks(), [story_sample(1), story_sample(2)]) is None
    monkeypatch.setattr(RetroReader, "answer", answer)
    with pytest.raises(BudgetError):
        run_stories(tmp_path, variants=VARIANTS[1:2])
    assert rows_of(tmp_path) == []


def test_keys_depend_on_all_that_decides_a_result() -> None:
    loader = VariantLoader(tiny_lm(), "tiny", CONFIG)
    from retrolm.evaluation.rows import cell_identity

    part = story_set(1)
    facts = [loader.open(variant).facts for variant in (*VARIANTS, Variant("recency", 72))]
    identities = [cell_identity(part.task, None, seed, fact) for fact in facts for seed in (1, 2)]
    samples = [story_sample(0), story_sample(0, answers=["x"]), story_sample(1)]
    keys = {sample_key(identity, sample) for identity in identities for sample in samples}
    assert len(keys) == 24


def test_only_equal_settings_share_a_batch() -> None:
    samples = [story_sample(i, max_new_tokens=4 + i % 2, chat=i < 4) for i in range(6)]
    found = [[sample.sample_id for sample in batch] for batch in batches(samples, 2)]
    assert found == [["0", "2"], ["1", "3"], ["4"], ["5"]]


def test_variants_are_only_what_differs() -> None:
    found = variants_of(["full", "recency", "retrolm"], [64, 128], ["auto", "none"])
    assert len(found) == 1 + 2 + 4
    assert found[0] == Variant("full")
    with pytest.raises(UserError, match="Did you mean 'recency'"):
        variants_of(["recenc"], [64], ["auto"])


def test_cells_take_the_last_row_of_a_sample(whole: Path) -> None:
    rows = rows_of(whole)
    again = [dict(rows[0], score=1.0, key="other")]
    assert cells_of([*rows, *again])[0]["num_samples"] == 5
    assert cells_of([*rows, *again])[0]["score"] > cells_of(rows)[0]["score"]


def test_a_runner_needs_no_events(tmp_path: Path) -> None:
    assert Runner(tiny_answerer(), tmp_path).run([], []) == []
