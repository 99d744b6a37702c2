"""Stage 2 as a user runs it: `data stage2`, `train stage2`, `train speed`, `eval loss`, `ask --adapter`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from cli_runner import Desk, Outcome, run_cli
from retrolm.cli.train_view import row_text
from retrolm.engine.model import RetroLM
from retrolm.training.data.rows import content_hash
from retrolm.training.stage2.split import excerpt
from stage2_run_maker import write_documents
from tiny_folder import save_tiny_model

RECIPE = """
[data]
path = "books.jsonl"
dev_path = "held_out.jsonl"
max_tokens = 180
min_tokens = 60
prefix = "chat"
dev_pieces = 2
[train]
model = {model}
dtype = "float32"
page_size = 16
kv_budget = 96
rank = 2
num_steps = 4
accumulate = 1
lr = 1e-2
log_every = 2
dev_every = 4
num_workers = 0
"""


@pytest.fixture(scope="module")
def bench(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and documents."""
    folder = write_documents(tmp_path_factory.mktemp("stage2"))
    (folder / "recipe.toml").write_text(RECIPE.format(model=json.dumps(str(desk.model))))
    return folder


@pytest.fixture(scope="module")
def trained(bench: Path) -> Outcome:
    return train(bench, "run")


def train(bench: Path, out: str, *options: object) -> Outcome:
    return run_cli("train", "stage2", bench / "recipe.toml", "--data-root", bench, "--out", bench / out, *options)


def test_train(bench: Path, trained: Outcome) -> None:
    assert trained.code == 0 and "Adapter:" in trained.out and "held-out loss" in trained.err
    assert "Go on with --resume" in train(bench, "parts", "--stop-after", "0.000001").out
    assert train(bench, "parts", "--resume").code == 0
    files = [bench / name / "adapter" / "adapter_model.safetensors" for name in ("run", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_ask_with_the_adapter(desk: Desk, bench: Path, trained: Outcome, tmp_path: Path) -> None:
    words = ["ask", desk.text, "What is late?", *desk.options, "--json"]
    plain, adapted = run_cli(*words).json, run_cli(*words, "--adapter", bench / "run" / "adapter").json
    assert plain["answer"] != adapted["answer"]
    other = save_tiny_model(tmp_path / "other", num_key_value_heads=4)
    words = ["ask", desk.text, "What?", *desk.options, "--model", other, "--adapter", bench / "run" / "adapter"]
    run_cli(*words).refused_in_one_line("was trained for another backbone", "num_kv_heads: adapter has 2, model has 4")
    run_cli("ask", desk.text, "What?", *desk.options, "--adapter", tmp_path).refused_in_one_line("holds no adapter")


def test_loss_on_held_out_texts(desk: Desk, bench: Path, trained: Outcome, tmp_path: Path) -> None:
    """Held-out loss falls with training; with a budget that holds the text it is full attention's."""
    words = ["eval", "loss", bench / "held_out.jsonl", "--model", desk.model, "--page-size", 16, "--length", 180]
    words += ["--adapter", "none", "--adapter", bench / "run" / "adapter", "--method", "retrolm", "--method", "full"]
    words += ["--method", "recency", "--kv-budget", 96, "--kv-budget", 256, "--num-pieces", 3]
    done = run_cli(*words, "--output", tmp_path / "rows.jsonl")
    assert done.code == 0 and "2 pieces of 180 tokens" in done.out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {(row["method"], row["kv_budget"], row["adapter"] is not None): row for row in rows}
    assert len(found) == 10
    for adapted in (False, True):
        full = found["full", None, adapted]["loss"]
        assert found["retrolm", 256, adapted]["loss"] == pytest.approx(full, abs=1e-5)
        assert found["retrolm", 96, adapted]["loss"] != pytest.approx(full, abs=1e-6)
    assert found["retrolm", 96, True]["loss"] < found["retrolm", 96, False]["loss"] - 0.01
    row = found["retrolm", 96, True]
    assert row["options"]["causal_selection"] and row["num_pieces"] == 2 and len(row["loss_by_piece"]) == 2


def test_the_loss_is_that_of_streaming_prefill(desk: Desk, bench: Path) -> None:
    words = ["eval", "loss", bench / "held_out.jsonl", "--model", desk.model, "--page-size", 16, "--length", 180]
    (row,) = run_cli(*words, "--method", "retrolm", "--kv-budget", 96, "--no-chat-prefix", "--json").json
    lm = RetroLM.from_pretrained(desk.model, kv_budget=96, page_size=16, causal_selection=True)
    texts = [json.loads(line)["text"] for line in (bench / "held_out.jsonl").read_text().splitlines()]
    ids = torch.tensor(lm.tokenizer(max(texts, key=len))["input_ids"])[:180]
    expected = torch.nn.functional.cross_entropy(lm.logits(ids)[:-1], ids[1:])
    assert min(abs(value - float(expected)) for value in row["loss_by_piece"]) < 1e-5


def test_loss_refuses(desk: Desk, bench: Path) -> None:
    words = ["eval", "loss", "--model", desk.model, "--page-size", 16, "--kv-budget", 96]
    run_cli(*words, bench / "nothing.jsonl").refused_in_one_line("No file")
    run_cli(*words, bench / "held_out.jsonl", "--length", 99999).refused_in_one_line("has 99999 tokens", "--length")
    run_cli(*words, bench / "held_out.jsonl", "--method", "retrol").refused_in_one_line("Did you mean 'retrolm'")


def test_speed(bench: Path, tmp_path: Path) -> None:
    words = ["train", "speed", bench / "recipe.toml", "--lengths", "64,200", "--repeats", "2"]
    done = run_cli(*words, "--json", "--output", tmp_path / "speed.json")
    assert done.code == 0 and done.json == json.loads((tmp_path / "speed.json").read_text())
    assert [row["num_tokens"] for row in done.json["rows"]] == [64, 200] and done.json["equal"]
    for row in done.json["rows"]:
        assert row["speed_up"] == row["sparse"]["tokens_per_s"] / row["full"]["tokens_per_s"]
        assert len(row["full"]["all_tokens_per_s"]) == 2
        for kind in ("sparse", "full"):
            assert list(row[kind]["parts"]) == ["forward", "backward", "optimiser"]
            assert all(0 < part["host_s"] <= part["seconds"] for part in row[kind]["parts"].values())
    assert done.err.count("backward") == 4  # two lengths, two kinds
    run_cli(*words, "--pool", tmp_path).refused_in_one_line("is a recipe of stage 2", "--pool has no meaning")


def test_no_speed_up_without_equality(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrolm.training.stage2 import speed

    monkeypatch.setitem(speed.TOLERANCE, "float32", -1.0)
    done = run_cli("train", "speed", bench / "recipe.toml", "--lengths", "64", "--repeats", "1", "--json")
    assert done.code == 1 and done.json["rows"][0]["speed_up"] is None and "times as fast" not in done.err


def test_data(bench: Path, tmp_path: Path) -> None:
    words = ["data", "stage2", bench / "books.jsonl", "--held-out", 3, "--excerpt-chars", 900, "--json"]
    found = run_cli(*words, "--out", tmp_path / "one").json
    assert found["train.jsonl.gz"]["documents"] == 7 and found["held_out.jsonl.gz"]["documents"] == 3
    run_cli(*words, "--out", tmp_path / "two")
    names = ("train.jsonl.gz", "held_out.jsonl.gz")
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    lines = [line for n in names for line in gzip.decompress((tmp_path / "one" / n).read_bytes()).splitlines()]
    texts = [json.loads(line)["text"] for line in lines]
    whole = [json.loads(line)["text"] for line in (bench / "books.jsonl").read_text().splitlines()]
    assert len(texts) == 10 and all(any(text in book for book in whole) for text in texts)
    assert max(len(text) for text in texts[:7]) == 900
    held_out = sorted(whole, key=content_hash)[:3]
    assert sorted(texts[7:]) == sorted(held_out)
    words[4] = 10
    run_cli(*words, "--out", tmp_path / "x").refused_in_one_line("has 10 documents", "leave none to train on")


def test_excerpts_begin_at_a_line_break() -> None:
    text = "front\n" * 50 + "body\n" * 500
    assert excerpt(text, 0) == text and excerpt(text, 9999) == text
    part = excerpt(text, 100)
    assert len(part) == 100 and text[text.index(part) - 1] == "\n" and text.index(part) >= len(text) // 10


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--set", "rnak=3"], ["'rnak'", "Did you mean 'rank'"]),
        (["--set", "attention=dense"], ["attention='dense'", "full, sparse"]),
        (["--stop-after", "-1"], ["--stop-after"]),
        (["--set", "retriever=nix"], ["No page retriever 'nix'"]),
        (["--set", "num_workers=1", "--set", "data.path=nix"], ["error: ", "nix is no document source"]),
    ],
)
def test_wrong_options_are_refused(options: list[str], parts: list[str], bench: Path) -> None:
    train(bench, "refused", *options).refused_in_one_line(*parts)
    assert not (bench / "refused").exists()


def test_out_must_be_a_folder(bench: Path) -> None:
    (bench / "file").write_text("mine")
    for options in ([], ["--resume"]):
        train(bench, "file", *options).refused_in_one_line("is a file, where a folder is needed")


def test_row_text() -> None:
    row = {"step": 5, "loss": 1.5, "tokens_per_s": 12345, "peak_device_bytes": 0}
    assert row_text(row) == "step 5: loss 1.500 · 12,345 tokens/s"
    assert row_text({"step": 5, "dev_loss": 2.25}) == "step 5: held-out loss 2.2500"


def test_page_recall_under_the_adapter(bench: Path, trained: Outcome, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "wide", max_position_embeddings=4096)
    words = ["eval", "retrieval", "--task", "ruler/niah_single_1", "--lengths", 700, "--num-samples", 1]
    words += ["--page-size", 16, "--model", model, "--retriever", "none", "--out", tmp_path]
    for adapter in ("none", bench / "run" / "adapter"):
        assert run_cli(*words, "--adapter", adapter).code == 0
    rows = [json.loads(line) for line in (tmp_path / "recall.jsonl").read_text().splitlines()]
    assert {row["adapter"] for row in rows} == {None, "model-stage2"}
    assert len({row["config_hash"] for row in rows}) == 2
