"""`retrolm eval`: rows on disk, clear refusals, page recall, other people's predictions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cli_runner import run_cli
from own_process import printed, start
from retrolm import RetroLM
from retrolm.evaluation.journal import Journal, read_lines
from retrolm.evaluation.retrieval.scores import page_indexes
from retrolm.retriever import PageRetriever, RetrieverCard
from tiny_folder import save_tiny_model

GOLDEN = Path(__file__).parent / "golden" / "infinitebench"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("eval") / "tiny", max_position_embeddings=4096)


def evaluate(model: Path, *arguments: object) -> list[object]:
    return ["eval", "--model", model, "--kv-budget", 256, "--page-size", 32, "--num-samples", 2, *arguments]


def test_a_run_writes_rows_and_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    words = evaluate(model, "--task", "ruler/vt", "--lengths", "1000,1200", "--batch-size", 2, "--out", tmp_path)
    words += ["--method", "full", "--method", "retrolm", "--method", "recency", "--keep-pages"]
    outcome = run_cli(*words)
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 6 and "[6/6] ruler/vt · 1200" in outcome.err
    rows = list(read_lines(tmp_path / "samples.jsonl"))
    assert len(rows) == 12 and {row["model"] for row in rows} == {"tiny"}
    assert all(bool(row["pages"]["ranked"]) == (row["method"] != "full") for row in rows)
    before = (tmp_path / "samples.jsonl").read_bytes()
    assert run_cli(*words).out == outcome.out
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_budgets_are_named_together_or_one_by_one(model: Path, tmp_path: Path) -> None:
    words = evaluate(model, "--task", "ruler/vt", "--lengths", "1000", "--out", tmp_path, "--kv-budget", "320,256")
    assert run_cli(*words).code == 0
    rows = [(row["kv_budget"], row["sample_id"]) for row in read_lines(tmp_path / "samples.jsonl")]
    assert rows == [(budget, name) for budget in (256, 320) for name in ("0", "1")]


def test_samples_can_be_made_beforehand(model: Path, tmp_path: Path) -> None:
    words = evaluate(model, "--task", "ruler/vt", "--lengths", "1000", "--out", tmp_path / "out")
    outcome = run_cli(*words, "--cache-dir", tmp_path / "cache", "--prepare-only")
    assert outcome.code == 0 and not (tmp_path / "out").exists()
    assert len(list((tmp_path / "cache").rglob("*.jsonl.gz"))) == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--out", "x"], ["--task"]),
        (["--task", "ruler/vt"], ["--out"]),
        (["--task", "ruler/v", "--out", "x"], ["Did you mean 'ruler/vt'"]),
        (["--task", "ruler/vt", "--out", "x", "--method", "retrol"], ["Did you mean 'retrolm'"]),
        (["--task", "ruler/vt", "--out", "x", "--lengths", "4k"], ["--lengths", "'4k'"]),
        (["--task", "ruler/vt", "--out", "x"], ["ask for one in tokens"]),
        (["--task", "ruler/vt", "--out", "x", "--kv-budget", "8192"], ["exceeds the model's window"]),
        (["--task", "ruler/vt", "--out", "x", "--kv-budget", "256,2K"], ["--kv-budget", "whole numbers", "'2K'"]),
        (["--task", "ruler/vt", "--out", "x", "--task-option", "essay=a"], ["task option 'essay'"]),
        (["--task", "ruler/vt", "--out", "x", "--lengths", "64"], ["ruler/vt: 64 tokens are too few"]),
        (["--task", "ruler/vt", "--out", "x", "--lengths", "9" * 12], ["from 1 to", "9" * 12]),
        (["--task", "ruler/qa_1", "--out", "x", "--lengths", "512"], ["needs a data folder"]),
        (["--task", "ruler/vt", "--out", "x", "--shards", "2"], ["--shards needs --ray"]),
        (["--task", "ruler/vt", "--out", "x", "--lengths", "1000", "--retriever", "nix"], ["No page retriever 'nix'"]),
    ],
)
def test_what_cannot_be_run_is_refused(model: Path, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    words = [str(tmp_path) if word == "x" else word for word in words]
    outcome = run_cli(*evaluate(model, *words))
    assert outcome.code == 2 and outcome.out == "" and "Traceback" not in outcome.err
    assert all(part in outcome.err.splitlines()[-1] for part in parts), outcome.err
    assert not (tmp_path / "samples.jsonl").exists() or (tmp_path / "samples.jsonl").read_bytes() == b""


def test_a_refused_run_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    words = evaluate(model, "--task", "ruler/vt", "--lengths", "1000", "--retriever", "nix", "--out", tmp_path / "rows")
    assert run_cli(*words).code == 2 and not (tmp_path / "rows").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["holds no rows"]),
        ('{"context": "x"}\n', ["row 1", "has no", "answers"]),
        ("[1]\n", ["row 1", "isn't a JSON object"]),
        ("{", ["line 1", "isn't JSON"]),
    ],
)
def test_broken_data_sets_are_refused(model: Path, tmp_path: Path, content: str, parts: list[str]) -> None:
    (tmp_path / "qasper.jsonl").write_text(content, encoding="utf-8")
    words = evaluate(model, "--task", "longbench/qasper", "--data-dir", tmp_path, "--out", tmp_path / "rows")
    run_cli(*words).refused_in_one_line("qasper.jsonl", *parts)


def test_a_folder_that_takes_no_rows_is_refused_before_samples_are_made(model: Path, tmp_path: Path) -> None:
    words = evaluate(model, "--task", "ruler/vt", "--lengths", "1000", "--method", "recency")
    (tmp_path / "file").touch()
    run_cli(*words, "--out", tmp_path / "file").refused_in_one_line("file")
    (tmp_path / "samples.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    run_cli(*words, "--out", tmp_path).refused_in_one_line("line 1", "has no key")
    (tmp_path / "samples.jsonl").unlink()
    with Journal(tmp_path / "samples.jsonl"):
        run_cli(*words, "--out", tmp_path).refused_in_one_line("in use by another run")


def test_page_recall_is_measured_once_and_drawn(model: Path, tmp_path: Path) -> None:
    words = ["eval", "retrieval", "--model", model, "--task", "ruler/niah_single_1", "--lengths", 1024]
    words += ["--num-samples", 2, "--page-size", 32, "--heatmap", 1, "--out", tmp_path / "out"]
    books = tmp_path / "essays.txt"
    books.write_text("The grass is green. The sky is blue. " * 400, encoding="utf-8")
    words += ["--task-option", f"essays={books}"]
    outcome = run_cli(*words)
    rows = list(read_lines(tmp_path / "out" / "recall.jsonl"))
    assert outcome.code == 0 and {"attention_mass", "mean_key", "untrained_bookmarks"} <= {r["index"] for r in rows}
    assert all({"recall", "best_layer", "layers", "config_hash", "commit"} <= set(row) for row in rows)
    for row in rows:
        assert row["recall_ci"][0] <= row["recall"] <= row["recall_ci"][1] and row["scoring_layers"] == [1, 2]
        assert row["best_recall"] == max(row["layers"][1:]) <= row["best_recall_ci"][1]
    assert {row["num_pages"] for row in rows} == {8, 14}
    assert {row["index"] for row in rows} >= set(page_indexes())
    (picture,) = (tmp_path / "out").glob("heatmap_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "out" / "recall.jsonl").read_bytes()
    assert run_cli(*words).code == 0
    assert (tmp_path / "out" / "recall.jsonl").read_bytes() == before


def test_page_recall_is_reported_by_layer_for_the_indexes_asked_for(model: Path, tmp_path: Path) -> None:
    books = tmp_path / "essays.txt"
    books.write_text("The grass is green. The sky is blue. " * 400, encoding="utf-8")
    words = ["eval", "retrieval", "--model", model, "--task", "ruler/niah_single_2", "--lengths", 1024]
    words += ["--num-samples", 2, "--page-size", 32, "--task-option", f"essays={books}", "--out", tmp_path / "rows"]
    run_cli(*words, "--index", "quest").refused_in_one_line("page index 'quest'", "quest_pages")
    assert run_cli(*words, "--index", "quest_pages").code == 0
    assert run_cli("report", tmp_path / "rows", "--out", tmp_path / "report").code == 0
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "recall in 14 pages by layer\n\n|  | 0 | 1 | 2 |" in report and "| quest_pages | – |" in report  # noqa: RUF001
    assert "mean_key" not in report and "untrained_bookmarks" in report


def test_page_recall_of_layers_that_agree(model: Path, tmp_path: Path) -> None:
    """The row stands beside the retriever's own, and is that of the standardised scores' mean; then that with words."""
    lm = RetroLM.from_pretrained(model, retriever=None)
    card = RetrieverCard(lm.backbone.fingerprint(), 2, 32, "own", {})
    PageRetriever(lm.backbone.projection_shapes(), lm.untrained_bookmark(), card).save(tmp_path / "own")
    (tmp_path / "essays.txt").write_text("The grass is green. The sky is blue. " * 400, encoding="utf-8")
    words = ["eval", "retrieval", "--model", model, "--retriever", tmp_path / "own", "--index", "recency"]
    words += ["--task", "ruler/niah_single_2", "--lengths", 1024, "--num-samples", 4, "--page-size", 32]
    words += ["--task-option", f"essays={tmp_path / 'essays.txt'}", "--out", tmp_path / "rows"]
    assert run_cli(*words).code == 0
    assert run_cli(*words, "--agreement-layers", 2).code == 0
    rows = list(read_lines(tmp_path / "rows" / "recall.jsonl"))
    agreed = [row for row in rows if row["index"] == "own, last 2 layers agreed"]
    assert len(agreed) == 2 and all(len(set(row["layers"])) == 1 for row in agreed)
    assert len({row["config_hash"] for row in rows}) == 2
    told = [row for row in rows if row["index"] == "own, last 2 layers agreed, words counted 1"]
    assert [row["recall"] for row in told] == [1.0, 1.0]  # the needle's page alone has its words
    assert [row["recall"] for row in rows if row["index"] == "words alone (BM25)"] == [1.0] * 4
    assert run_cli(*words, "--agreement-layers", 2, "--word-weight", 0).code == 0
    rows = list(read_lines(tmp_path / "rows" / "recall.jsonl"))
    assert sum("words counted" in row["index"] for row in rows) == 4
    assert len({row["config_hash"] for row in rows}) == 3


def test_pages_are_as_long_as_those_retrievers_were_trained_with(model: Path, tmp_path: Path) -> None:
    lm = RetroLM.from_pretrained(model, retriever=None)
    for size in (16, 32):
        card = RetrieverCard(lm.backbone.fingerprint(), 2, size, f"of{size}", {})
        PageRetriever(lm.backbone.projection_shapes(), lm.untrained_bookmark(), card).save(tmp_path / f"of{size}")
    (tmp_path / "essays.txt").write_text("The grass is green. The sky is blue. " * 400, encoding="utf-8")
    words = ["eval", "retrieval", "--model", model, "--index", "recency", "--task", "ruler/niah_single_2"]
    words += ["--lengths", 1024, "--num-samples", 1, "--task-option", f"essays={tmp_path / 'essays.txt'}"]
    words += ["--out", tmp_path / "rows", "--retriever", tmp_path / "of32"]
    assert run_cli(*words).code == 0
    assert {row["page_size"] for row in read_lines(tmp_path / "rows" / "recall.jsonl")} == {32}
    two = [*words, "--retriever", tmp_path / "of16"]
    run_cli(*two).refused_in_one_line("pages of 16 and 32 tokens", "--page-size")
    assert run_cli(*two, "--page-size", 32).code == 0


def test_a_retriever_trained_in_another_reading_is_refused(model: Path, tmp_path: Path) -> None:
    lm = RetroLM.from_pretrained(model, retriever=None)
    shapes, recipe = lm.backbone.projection_shapes(), {"train": {"bookmarks": "visible"}}
    card = RetrieverCard(lm.backbone.fingerprint(), 2, 32, "seen", {"recipe": recipe})
    PageRetriever(shapes, lm.untrained_bookmark(), card).save(tmp_path / "seen")
    words = [
        "eval",
        "retrieval",
        "--model",
        model,
        "--task",
        "ruler/niah_single_1",
        "--lengths",
        1024,
        "--out",
        tmp_path,
    ]
    run_cli(*words, "--retriever", tmp_path / "seen").refused_in_one_line(
        "bookmarks='visible'", "bookmarks='invisible'"
    )


# --- predictions of others -----------------------------------------------------------------------------------------


def test_published_predictions_get_the_published_score() -> None:
    """GPT-4 on En.MC of InfiniteBench: 67.25 in its paper."""
    (path,) = (GOLDEN / "gpt4").glob("*longbook_choice_eng*")
    found = run_cli("eval", "score", path, "--task", "infinitebench/longbook_choice_eng", "--json").json
    assert round(100 * found["score"], 2) == 67.25
    assert found["num_samples"] == len(found["scores"]) == 229


@pytest.mark.parametrize(
    ("row", "score"),
    [
        ({"pred": "Paris", "answers": ["Paris"]}, 1.0),
        ({"prediction": "in Paris", "ground_truth": "Paris"}, 2 / 3),
        ({"pred": "Rome", "outputs": ["Paris"]}, 0.0),
    ],
)
def test_rows_of_several_harnesses_are_read(tmp_path: Path, row: dict[str, object], score: float) -> None:
    path = tmp_path / "predictions.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))
    found = run_cli("eval", "score", path, "--task", "longbench/qasper", "--json").json
    assert found["score"] == pytest.approx(score)


def test_unreadable_predictions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    task = ("--task", "longbench/qasper")
    run_cli("eval", "score", path, *task).refused_in_one_line("no file")
    path.write_text('{"pred": "x"}\n', encoding="utf-8")
    run_cli("eval", "score", path, *task).refused_in_one_line("row 1", "answers")
    path.write_text("", encoding="utf-8")
    run_cli("eval", "score", path, *task).refused_in_one_line("holds no rows")
    path.write_text("3\n", encoding="utf-8")
    run_cli("eval", "score", path, *task).refused_in_one_line("row 1", "isn't a JSON object")
    for answers in ([], None, [None]):
        path.write_text(json.dumps({"pred": "x", "answers": answers}) + "\n", encoding="utf-8")
        run_cli("eval", "score", path, *task).refused_in_one_line("row 1", "no answer")
    path.write_text('{"pred": "x", "answers": ["a"]}\n', encoding="utf-8")
    run_cli("eval", "score", path, "--task", "infinitebench/math_find").refused_in_one_line("a number", "'a'")
    path.with_suffix(".jsonl.gz").write_bytes(b"not packed")
    run_cli("eval", "score", path.with_suffix(".jsonl.gz"), *task).refused_in_one_line("can't be read")


def test_no_answer_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"pred": null, "answers": ["none"]}\n', encoding="utf-8")
    assert run_cli("eval", "score", path, "--task", "longbench/qasper", "--json").json["score"] == 0


def test_rows_of_several_methods_have_no_one_score(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    rows = [{"config_hash": name, "prediction": "1", "answers": ["1"], "sample_id": "0"} for name in ("a", "b", "a")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_cli("eval", "score", path, "--task", "ruler/vt").refused_in_one_line("several", "retrolm report")
    path.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    assert run_cli("eval", "score", path, "--task", "ruler/vt", "--json").json["score"] == 1


def test_a_fresh_process_knows_the_rag_methods() -> None:
    """Nothing has imported their room yet; the refusal is about what comes after methods are looked up."""
    words = ["eval", "--task", "ruler/vt", "--out", "x", "--model", "/no/such-model", "--method", "rag_bm25"]
    found = printed(*start(run_cli, *words))
    assert "code=2" in found and "/no/such-model" in found and "rag_bm25" not in found


@pytest.mark.parametrize(
    "words", [["retrieval", "--task", "ruler/vt"], ["attention", "--task", "ruler/vt"], ["generation"]]
)
def test_a_folder_that_can_not_be_is_refused_before_the_model_is_looked_for(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    outcome = run_cli("eval", *words, "--model", "/no/such-model", "--out", tmp_path / "file" / "rows")
    outcome.refused_in_one_line("is a file", "--out")
