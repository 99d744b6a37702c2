"""`retrolm reproduce`: tables of a preset, end to end at toy scale, and the presets that come with the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import retrolm.evaluation.readers
from cli_runner import Outcome, run_cli
from retrolm.cli.known_methods import known_methods
from retrolm.errors import UserError
from retrolm.evaluation.journal import read_lines
from retrolm.evaluation.reproduce import load_preset
from tiny_folder import save_tiny_model

CONFIGS = Path(__file__).parent.parent / "configs" / "reproduce"
PRESET = """
title = "Toy tables"
model = {model}
page_size = 32
[[tables]]
name = "needles"
title = "Table A: needles"
tasks = ["ruler/niah_single_1", "ruler/qa_1"]
lengths = [600, 900]
methods = ["full", "retrolm"]
kinds = ["prune"]
retrievers = ["none"]
kv_budgets = [512]
num_samples = 1
[[tables]]
name = "budgets"
title = "Table B: budgets"
tasks = ["ruler/niah_single_1"]
lengths = [600]
methods = ["retrolm"]
retrievers = ["none"]
kv_budgets = [128, 512]
num_samples = 1
adapter = true
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a preset and the outcome of running it."""
    folder = tmp_path_factory.mktemp("reproduce")
    model = save_tiny_model(folder / "tiny", max_position_embeddings=4096)
    (folder / "preset.toml").write_text(PRESET.format(model=json.dumps(str(model))), encoding="utf-8")
    return folder


def reproduce(bench: Path) -> Outcome:
    return run_cli("reproduce", bench / "preset.toml", "--out", bench / "out")


@pytest.fixture(scope="module")
def outcome(bench: Path) -> Outcome:
    return reproduce(bench)


def test_every_table_is_written_and_what_is_missing_is_named(bench: Path, outcome: Outcome) -> None:
    assert outcome.code == 0 and outcome.out.strip() == str(bench / "out" / "README.md")
    index = (bench / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Table A: needles" in index and "## Table B: budgets" in index and "(budgets/report.md)" in index
    assert "memory (no GPU used) by prompt length (GB):" in index
    not_run = index.split("## Not run")[1]
    assert "ruler/qa_1" in not_run and "needs a data folder" in not_run and "stage 2 needs an adapter" in not_run
    assert "not run: needles: ruler/qa_1" in outcome.err
    for name in ("needles", "budgets"):
        assert (bench / "out" / name / "report.html").is_file()
    budgets = (bench / "out" / "budgets" / "report.md").read_text(encoding="utf-8")
    assert (
        "| 128 |" in budgets and "| full |" not in budgets and "600 tokens" in budgets and "900 tokens" not in budgets
    )


def test_rows_that_two_tables_need_are_answered_once(bench: Path, outcome: Outcome) -> None:
    rows = list(read_lines(bench / "out" / "rows" / "samples.jsonl"))
    methods = {(row["method"], row["length"], row["kv_budget"]) for row in rows}
    assert {("full", 600, None), ("retrolm", 900, 512), ("retrolm", 600, 128)} <= methods
    assert len(rows) == len({row["key"] for row in rows}) == len(methods)


def test_a_second_run_answers_nothing_again(bench: Path, outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (bench / "out" / "rows" / "samples.jsonl").read_bytes()
    monkeypatch.setattr(retrolm.evaluation.readers.RetroReader, "answer", None)
    assert reproduce(bench).code == 0
    assert (bench / "out" / "rows" / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_presets_of_the_project_name_what_there_is(path: Path) -> None:
    known_methods()
    preset = load_preset(path)
    names = [table.name for table in preset.tables]
    assert len(set(names)) == len(names) and {"table1", "table2", "table3", "table4", "table5"} <= set(names)
    assert all(table.variants("adapter") for table in preset.tables)
    assert load_preset(path).with_samples(3).tables[0].num_samples == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('tasks = ["ruler/niah_single_1"]', 'tasks = ["ruler/niah"]'), "Unknown task or group 'ruler/niah'"),
        (('methods = ["retrolm"]', 'methods = ["retro"]'), "Did you mean 'retrolm'"),
        (("lengths = [600]\n", 'lengths = ["short"]\n'), "or 'natural', got 'short'"),
        (("kv_budgets = [128, 512]", "budgets = [128]"), "Unknown key of a TablePlan 'budgets'"),
        (('kinds = ["prune"]', 'kinds = ["prunes"]'), "Unknown kind of methods 'prunes'"),
        (('title = "Table B: budgets"\n', ""), "lacks title"),
        (("[[tables]]", "[tables]"), "Can't read the preset"),
        (
            ('tasks = ["ruler/niah_single_1"]', 'tasks = "ruler/vt"'),
            "tasks of a TablePlan must be a list, got 'ruler/vt'",
        ),
        (("page_size = 32", 'page_size = "32"'), "page_size of a Preset must be a whole number, got '32'"),
        (("adapter = true", "adapter = 1"), "adapter of a TablePlan must be true or false, got 1"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "preset.toml"
    text = PRESET.format(model='"tiny"')
    assert change[0] in text
    path.write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_preset(path)
