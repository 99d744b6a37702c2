"""`demo`: questions from the checkout's examples, the model fetched if it is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli_runner import Desk, run_cli
from retrolm.engine.model import RetroLM
from tiny_folder import write_story

CONTENT = {
    "book": "book.txt",
    "title": "The Ship",
    "author": "A. Hale",
    "opening_chars": 700,
    "questions": [{"question": "What did the captain count?", "expected": "The lamps", "evidence": "the lamps"}],
    "book_questions": [
        {"question": "How many houses?", "expected": "12"},
        {"question": "Who wrote?", "expected": "Hale"},
    ],
}


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    folder = tmp_path / "examples"
    folder.mkdir()
    write_story(folder / "book.txt")
    (folder / "questions.json").write_text(json.dumps(CONTENT), encoding="utf-8")
    return folder


def test_demo_shows_question_expected_answer_and_cost(desk: Desk, examples: Path) -> None:
    outcome = run_cli("demo", "--examples", examples, *desk.options)
    assert outcome.code == 0
    for part in ("What did the captain count?", "expected", "The lamps", "page ", "tokens attended", "KV on host"):
        assert part in outcome.out
    assert "untrained bookmarks" in outcome.out
    assert "the opening of The Ship by A. Hale" in outcome.err


def test_demo_says_where_the_evidence_stands(desk: Desk, examples: Path) -> None:
    answer = run_cli("demo", "--examples", examples, *desk.options, "--json").json["answers"][0]
    everything = ["--kv-budget", "500"]
    attended = run_cli("demo", "--examples", examples, *desk.options, *everything, "--json").json["answers"][0]
    text = (examples / "book.txt").read_text(encoding="utf-8")
    lm = RetroLM.from_pretrained(desk.model, kv_budget=96, page_size=16)
    start, end = lm.read(text[:700]).page_spans[answer["evidence"]["page"]]
    assert start <= text.index("the lamps") < end
    assert attended["evidence"] == {**answer["evidence"], "num_layers": 3}


def test_demo_says_so_where_the_method_needs_no_retriever(desk: Desk, examples: Path) -> None:
    shown = run_cli("demo", "--examples", examples, *desk.options, "--method", "mean_key").out
    assert "picked by mean_key, which is not trained" in shown and "untrained" not in shown


def test_demo_reads_the_opening_or_the_whole_book(desk: Desk, examples: Path) -> None:
    opening = run_cli("demo", "--examples", examples, *desk.options, "--json").json
    book = run_cli("demo", "--examples", examples, *desk.options, "--json", "--book").json
    text = (examples / "book.txt").read_text(encoding="utf-8")
    assert opening["num_words"] == len(text[:700].split()) < book["num_words"] == len(text.split())
    assert [entry["expected"] for entry in book["answers"]] == ["12", "Hale"]
    assert {"answer", "pages", "attended_tokens", "ttft_s", "kv_bytes"} <= opening["answers"][0].keys()


def test_demo_fetches_a_missing_model(tmp_path: Path, examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def pull(name: str, **_: Any) -> None:
        fetched.append(name)

    monkeypatch.setenv("RETROLM_CACHE", str(tmp_path))
    monkeypatch.setattr("retrolm.engine.pull.pull", pull)
    outcome = run_cli("demo", "--examples", examples)
    assert fetched == ["smollm2-135m-instruct"]
    assert outcome.code == 2 and "licence Apache-2.0" in outcome.err  # this `pull` brings nothing


def test_demo_without_a_checkout_says_what_is_missing(examples: Path) -> None:
    (examples / "questions.json").unlink()
    run_cli("demo", "--examples", examples).refused_in_one_line("source checkout", "questions.json")


@pytest.mark.parametrize("broken", ["{", "[]", '{"book": 3}', json.dumps({**CONTENT, "questions": [{}]})])
def test_demo_refuses_a_broken_list_of_questions(examples: Path, broken: str) -> None:
    (examples / "questions.json").write_text(broken, encoding="utf-8")
    run_cli("demo", "--examples", examples).refused_in_one_line("questions.json", "Restore it")


def test_demo_refuses_a_part_without_questions(examples: Path) -> None:
    (examples / "questions.json").write_text(json.dumps({**CONTENT, "book_questions": []}), encoding="utf-8")
    run_cli("demo", "--examples", examples, "--book").refused_in_one_line("no questions")


def test_demo_refuses_a_missing_book(examples: Path) -> None:
    (examples / "book.txt").unlink()
    run_cli("demo", "--examples", examples).refused_in_one_line("book.txt")
