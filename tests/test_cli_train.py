"""`retrolm data stage1`, `train stage1` and `retriever export`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_runner import Desk, Outcome, run_cli
from retrolm.cli.train_options import parse_overrides
from retrolm.cli.train_view import row_text
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from stage1_pool_maker import write_corpus

RECIPE = """
[data]
min_tokens = 100
max_tokens = 400
length_group = 2
max_passage_tokens = 60
dev_fraction = 0.15
weights = {{ wiki = 2, chat = 1, facts = 1 }}
[[data.sources]]
name = "pairs"
path = "pairs"
format = "pooled"
[[data.sources]]
name = "library"
path = "library"
format = "documents"
[train]
model = {model}
dtype = "float32"
page_size = 32
rank = 2
num_steps = 4
tokens_per_batch = 800
log_every = 2
dev_every = 4
dev_samples = 4
num_workers = 0
"""


@pytest.fixture(scope="module")
def bench(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a corpus."""
    folder = tmp_path_factory.mktemp("bench")
    write_corpus(folder / "corpus", num_passages=60)
    (folder / "recipe.toml").write_text(RECIPE.format(model=json.dumps(str(desk.model))))
    return folder


@pytest.fixture(scope="module")
def trained(bench: Path) -> Outcome:
    """One run that prepares its pool itself."""
    return train(bench, "run", "--data-root", bench / "corpus")


def train(bench: Path, out: str, *options: object) -> Outcome:
    return run_cli("train", "stage1", bench / "recipe.toml", "--pool", bench / "pool", "--out", bench / out, *options)


def test_data_stage1(bench: Path) -> None:
    words = ["data", "stage1", bench / "recipe.toml", "--data-root", bench / "corpus", "--out", bench / "own pool"]
    done = run_cli(*words)
    assert done.code == 0 and "pairs" in done.out and "questions" in done.err
    run_cli(*words).refused_in_one_line("holds a pool already")
    words[-1] = bench / "third pool"
    manifest = run_cli(*words, "--json").json
    assert manifest["num_books"] == 6 and manifest["num_questions"]["train"]["wiki"] > 10
    words = ["data", "stage1", bench / "recipe.toml", "--data-root", bench / "nowhere", "--out", bench / "x"]
    failed = run_cli(*words)
    assert failed.code == 2 and "nowhere" in failed.err.splitlines()[-1]


def test_train_stage1(bench: Path, trained: Outcome, desk: Desk) -> None:
    assert trained.code == 0, trained
    assert trained.out.startswith("Trained: 4 steps,") and str(bench / "run" / "retriever") in trained.out
    assert "step 2: loss " in trained.err and "tokens/s" in trained.err and "dev recall " in trained.err
    lm = RetroLM.from_pretrained(desk.model, retriever=bench / "run" / "retriever", kv_budget=128, page_size=32)
    assert lm.retriever is not None and lm.retriever_name == "model-stage1"
    details = lm.retriever.card.details
    assert details["step"] == 4 and details["recipe"]["train"]["model"] == "model"
    assert details["data"]["licences"] == {"pairs": "not stated", "library": "not stated"}


def test_stop_and_resume(bench: Path, trained: Outcome) -> None:
    assert "Go on with --resume" in train(bench, "parts", "--stop-after", "0.000001").out
    train(bench, "parts").refused_in_one_line("holds the checkpoint of another run", "--resume")
    train(bench, "parts", "--resume", "--set", "rank=3").refused_in_one_line("train.rank was 2 and is now 3")
    assert train(bench, "parts", "--resume").code == 0
    files = [bench / name / "retriever" / "retriever.safetensors" for name in ("run", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--set", "rnak=3"], ["'rnak'", "Did you mean 'rank'"]),
        (["--set", "rank"], ["key=value"]),
        (["--set", "lr=fast"], ["lr must be a number, got 'fast'"]),
        (["--set", "lr=0.1", "--set", "lr=0.2"], ["--set lr is given twice"]),
        (["--stop-after", "-1"], ["--stop-after"]),
        (["--set", "model=nowhere"], ["Unknown model 'nowhere'"]),
        (["--tracker", "notepad"], ["notepad"]),
    ],
)
def test_wrong_options_are_refused(options: list[str], parts: list[str], bench: Path, trained: Outcome) -> None:
    train(bench, "refused", *options).refused_in_one_line(*parts)
    assert not (bench / "refused").exists()


def test_speed(bench: Path, trained: Outcome, tmp_path: Path) -> None:
    words = ["train", "speed", bench / "recipe.toml"]
    done = run_cli(*words, "--pool", bench / "pool", "--batches", 2, "--json", "--output", tmp_path / "speed.json")
    assert done.code == 0 and done.json == json.loads((tmp_path / "speed.json").read_text())
    assert done.json["num_batches"] == 2 and "overhead" in done.err and "frozen pass" in done.err
    run_cli(*words).refused_in_one_line("is a recipe of stage 1", "--pool")
    run_cli(*words, "--pool", bench / "pool", "--repeats", 2).refused_in_one_line("stage 1", "--repeats has no meaning")


def test_retrievers_beside_one_another(bench: Path, trained: Outcome, tmp_path: Path) -> None:
    own, out = bench / "run" / "retriever", tmp_path / "rows.jsonl"
    words = ["train", "recall", bench / "recipe.toml", "--pool", bench / "pool", "--texts", 5, "--lengths", "150,200"]
    done = run_cli(*words, "--retriever", own, "--retriever", "none", "--output", out)
    assert done.code == 0 and "best layer" in done.out and "people" in done.out
    assert all(len(line.split()) in (5, 6) for line in done.out.splitlines() if line.startswith("none"))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["retriever"], row["length"]) for row in rows] == [
        (name, length) for length in (150, 200) for name in (str(own), "none")
    ]
    assert all(row["num_texts"] == 5 and len(row["layers"]) > 1 and "commit" in row for row in rows)
    one = run_cli(*words, "--retriever", "none", "--output", out)
    assert one.code == 0
    alone = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["layers"] for row in alone] == [row["layers"] for row in rows[1::2]]
    assert run_cli(*words, "--retriever", "none", "--kind", "people", "--output", out).code == 0
    assert all(list(json.loads(line)["kinds"]) == ["people"] for line in out.read_text().splitlines())
    run_cli(*words, "--retriever", "none", "--kind", "peopel").refused_in_one_line("'peopel'", "Did you mean 'people'")
    run_cli(*words, "--retriever", bench / "nowhere").refused_in_one_line("nowhere")
    run_cli(*words, "--retriever", "none", "--lengths", "natural").refused_in_one_line("--lengths")


def test_a_pool_is_needed(bench: Path) -> None:
    words = ["train", "stage1", bench / "recipe.toml", "--pool", bench / "missing", "--out", bench / "refused"]
    run_cli(*words).refused_in_one_line("is no prepared pool", "retrolm data stage1")


def test_export(bench: Path, trained: Outcome) -> None:
    source = bench / "run" / "retriever"
    done = run_cli("retriever", "export", source, "--out", bench / "small", "--bits", "8", "--json")
    assert done.json["bytes"] < done.json["bytes_before"] and done.json["bits"] == 8
    assert run_cli("retriever", "info", bench / "small", "--json").json["details"]["bits"] == 8
    assert "16 bits per weight" in run_cli("retriever", "export", source, "--out", bench / "half", "--bits", "16").out
    run_cli("retriever", "export", source, "--out", bench / "odd", "--bits", "7").refused_in_one_line("bits=7", "8, 16")
    run_cli("retriever", "export", source, "--out", source).refused_in_one_line("is the retriever itself")


def test_overrides_are_read_as_toml() -> None:
    pairs = ["lr=1e-3", "num-steps=7", "calibrate=false", "model=a/b", 'dtype="float32"', "init_from="]
    assert parse_overrides(pairs) == {
        "lr": 1e-3, "num_steps": 7, "calibrate": False, "model": "a/b", "dtype": "float32", "init_from": "",
    }  # fmt: skip
    with pytest.raises(UserError, match="key=value"):
        parse_overrides(["=3"])


def test_row_text() -> None:
    row = {"step": 5, "loss": 1.5, "recall8": None, "tokens_per_s": 12345, "peak_device_bytes": 3_500_000_000}
    assert row_text(row) == "step 5: loss 1.500 · recall@8 - · 12,345 tokens/s · peak 3.50 GB"
    found = {"mean": 0.5, "best": 0.9, "agreed": 0.95, "kinds": {"facts": None}}
    assert row_text({"step": 5, "dev_recall": found}) == (
        "step 5: dev recall 0.50 (best layer 0.90, agreed with words 0.95; facts -)"
    )
