"""`bench --shape`: rows as they are taken, recorded selections replayed, no speed-up where the check is red."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cli_runner import Desk, run_cli
from retrolm.config import RetroConfig
from retrolm.engine import shape_bench
from retrolm.engine.model import RetroLM
from retrolm.engine.random_model import SHAPES, load_shape, random_model
from retrolm.engine.selections import RecordingMethod, ReplayMethod, load_selections, save_selections
from retrolm.engine.shape_bench import MEASUREMENTS, Row, ShapeBench, ShapePlan, speed_ups
from retrolm.errors import UserError
from retrolm.methods import METHODS
from tiny_models import random_ids, tiny_config, tiny_model

CONFIG = RetroConfig(kv_budget=48, page_size=8, chunk_pages=4)


@pytest.fixture(scope="module")
def shape_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "tiny.json"
    path.write_text(json.dumps({**tiny_config("llama").to_diff_dict(), "model_type": "llama"}), encoding="utf-8")
    return path


def options(shape: Path, *more: Any) -> list[Any]:
    sizes = ["--kv-budget", 48, "--page-size", 8, "--chunk-pages", 4, "--device-kv-gb", 0.00008]
    return ["bench", "--shape", shape, *sizes, "--verify-tokens", 99, "--max-new-tokens", 3, *more]


def test_every_measurement_becomes_a_row(shape_file: Path, tmp_path: Path) -> None:
    target, plot = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    more = ["--lengths", "100,300", "--batches", "1,2", "--output", target, "--plot", plot, "--json"]
    outcome = run_cli(*options(shape_file, *more))
    assert outcome.code == 0
    head, *rows = (json.loads(line) for line in target.read_text(encoding="utf-8").splitlines())
    assert head["equal_to_stock"]["passed"] and head["selections"] == "uniform" and head["commit"] != ""
    kinds = [(row["num_tokens"], row["what"], row["batch"]) for row in rows]
    per_length = [(what, batch) for what in MEASUREMENTS for batch in ((1, 2) if "decode" in what else (1,))]
    assert kinds == [(length, *rest) for length in (100, 300) for rest in per_length]
    assert all(row["error"] is None for row in rows)
    assert all((row["request_s"] if row["what"] == "stock-request" else row["tokens_per_s"]) > 0 for row in rows)
    host = next(row for row in rows if row["what"] == "ours-host" and row["num_tokens"] == 300)
    assert 0 < host["hit_rate"] <= 1 and host["store_bytes_to_host"] > 0 and host["pages_fetched_per_page"] > 0
    found = outcome.json
    assert found["rows"] == rows and found["speed_ups"]["300"].keys() == {"prefill", "of_ceiling", "decode"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_no_speed_up_where_the_check_is_red(shape_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RetroLM.logits

    def logits(self: RetroLM, input_ids: Tensor) -> Tensor:
        return real(self, input_ids) + 1e-2

    monkeypatch.setattr(RetroLM, "logits", logits)
    more = ["--lengths", "60", "--measure", "ours-device,stock-prefill"]
    outcome = run_cli(*options(shape_file, *more))
    assert outcome.code == 1
    assert "No speed-up is shown" in outcome.err and "times the stock" not in outcome.err
    assert run_cli(*options(shape_file, *more, "--json")).json["speed_ups"] == {}


def test_rows_are_on_disk_before_the_next_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   shape_file: Path) -> None:  # fmt: skip
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShapeBench, "_ceiling", killed)
    monkeypatch.setattr(ShapeBench, "_warm_up", lambda self: None)
    target = tmp_path / "rows.jsonl"
    run_cli(*options(shape_file, "--lengths", "60", "--measure", "stock-prefill,ceiling", "--output", target))
    assert [json.loads(line).get("what") for line in target.read_text().splitlines()] == [None, "stock-prefill"]


def test_what_does_not_fit_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ShapeBench, "_stock_prefill", full)
    plan = ShapePlan((60,), CONFIG, ("stock-prefill", "ceiling"))
    rows = list(ShapeBench(tiny_model("llama"), plan).run())
    assert [row.error for row in rows] == ["out of device memory", None]
    assert speed_ups(rows) == {60: {}}


def test_speed_ups_are_over_the_best_of_the_stock_model() -> None:
    rows = [
        Row("stock-prefill", 10, figures={"seconds": 4.0}),
        Row("ceiling", 10, figures={"seconds": 0.9}),
        Row("ours-device", 10, figures={"seconds": 2.0}),
        Row("ours-host", 10, figures={"seconds": 1.0}),
        Row("decode", 10, figures={"s_per_token": 1.0}),
        Row("stock-decode", 10, figures={"s_per_token": 9.0}),
        Row("stock-decode-compiled", 10, figures={"s_per_token": 2.0}),
        Row("decode", 10, batch=4, figures={"s_per_token": 0.1}),
    ]
    assert speed_ups(rows) == {10: {"prefill": 4.0, "of_ceiling": 0.9, "decode": 2.0}}


def test_committed_shapes_load() -> None:
    assert {path.stem for path in SHAPES.glob("*.json")} >= {"llama-8b", "qwen-0.5b"}
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96}
    for path in SHAPES.glob("*.json"):
        big = load_shape(path.stem)
        small = random_model(big, torch.bfloat16, torch.device("cpu"), num_hidden_layers=1, **sizes)
        assert len(small.model.layers) == 1 and small.lm_head.weight.dtype == torch.bfloat16
        assert big.num_hidden_layers > 20


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--shape", "lama-8b"], "llama-8b"),
        (["--shape", "llama-8b", "--measure", "decod"], "decode"),
        (["--shape", "llama-8b", "--batches", "0"], "--batches"),
        (["--shape", "llama-8b", "--selections", "no.npz"], "no.npz"),
        (["--plot", "x.png"], "--shape"),
        (["--record-selections", "x.npz"], "--file"),
    ],
)
def test_bad_input_is_refused_in_one_line(more: list[str], word: str) -> None:
    run_cli("bench", *more).refused_in_one_line(word)


# --- selections ---------------------------------------------------------------------------------------------


def test_selections_are_recorded_and_replayed(desk: Desk, tmp_path: Path, shape_file: Path) -> None:
    target = tmp_path / "picks.npz"
    outcome = run_cli("bench", *desk.options, "--file", desk.text, "--record-selections", target)
    assert outcome.code == 0
    recorded = load_selections(target)
    assert recorded.dim() == 3 and (recorded[0] == -1).all()  # the first layer chooses by recency
    pages = torch.arange(recorded.shape[1])[None, :, None]
    assert (recorded[1:] < pages).all() and (recorded[1:, 8:, 0] >= 0).all()
    more = ["--lengths", "200", "--measure", "ours-host", "--selections", target, "--json"]
    assert run_cli(*options(shape_file, *more)).json["selections"] == "picks.npz"


def test_a_recording_replayed_at_its_own_length_is_what_was_recorded() -> None:
    """Pages read and scored anew choose what the trained retriever chose, whatever the weights say."""
    lm, ids = RetroLM(tiny_model("llama"), config=CONFIG), random_ids(200)
    inner = METHODS.get("retrolm")()
    recording = RecordingMethod(inner, keep=6)
    lm.method = recording
    lm.read(ids)
    recorded = recording.selections(4, 25)
    other = RetroLM(tiny_model("llama", seed=5), config=CONFIG)
    replay = ReplayMethod(inner, recorded, 4, 25)
    again = RecordingMethod(replay, keep=6)
    other.method = again
    other.read(ids)
    found = again.selections(4, 25)
    chosen = recorded[1:, 7:] >= 0
    assert torch.equal(found[1:, 7:][chosen], recorded[1:, 7:][chosen]) and chosen.any()


@pytest.mark.parametrize("num_pages", [100, 800, 4000])
def test_stretched_selections_lie_in_the_past_and_come_back(num_pages: int) -> None:
    generator = torch.Generator().manual_seed(0)
    recorded = (torch.rand(2, 200, 5, generator=generator) * torch.arange(200)[None, :, None]).long()
    replay = ReplayMethod(METHODS.get("retrolm")(), recorded, 2, num_pages)
    ordinals = torch.arange(num_pages // 2, num_pages // 2 + 16)
    assert replay._picked_LPS is not None
    picked = replay._picked_LPS[1, ordinals]
    assert (picked >= 0).all() and (picked < num_pages).all()
    share = (picked < ordinals[:, None]).float().mean()
    assert share > 0.9  # rounding to blocks may put a few pages ahead of the page that picks them


def test_a_file_without_selections_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picks.npz"
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(UserError, match="holds no recorded selections"):
        load_selections(path)
    save_selections(path, torch.zeros(2, 3, 4, dtype=torch.int64), {"model": "m"})
    assert load_selections(path).shape == (2, 3, 4) and list(tmp_path.iterdir()) == [path]


def test_measurements_are_named() -> None:
    with pytest.raises(UserError, match="Unknown measurement 'prefil'"):
        ShapePlan((10,), CONFIG, ("prefil",))
    assert shape_bench.MEASUREMENTS == MEASUREMENTS
