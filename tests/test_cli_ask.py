"""`ask` and `chat`: answers on stdout, everything else on stderr, stable JSON keys."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from cli_runner import Desk, run_cli
from retrolm.engine.model import RetroLM

QUESTION = "What did the captain count?"
KEYS = {
    *("answer", "model", "method", "retriever", "kv_budget", "page_size", "num_tokens", "num_pages"),
    *("attended_tokens", "pages", "prefill_s", "ttft_s", "tpot_s", "kv_bytes"),
}


def test_ask_prints_the_answer_alone_on_stdout(desk: Desk) -> None:
    outcome = run_cli("ask", desk.text, QUESTION, *desk.options)
    lm = RetroLM.from_pretrained(desk.model, kv_budget=96, page_size=16)
    expected = lm.read(desk.text).ask(QUESTION, max_new_tokens=4)
    assert (outcome.code, outcome.out) == (0, expected.text + "\n")
    assert "Read " in outcome.err and "untrained" in outcome.err and "tokens/s" in outcome.err


def test_ask_json_has_the_promised_keys(desk: Desk) -> None:
    outcome = run_cli("ask", desk.text, QUESTION, "--json", *desk.options)
    found = outcome.json
    assert outcome.err == ""
    assert found.keys() >= KEYS
    assert set(found["attended_tokens"]) == {"prefill", "decode"}
    assert {"device", "host"} <= set(found["kv_bytes"])
    assert found["attended_tokens"]["prefill"] <= found["kv_budget"] == 96


def test_ask_json_pages_are_spans_of_the_text(desk: Desk) -> None:
    apart = ["--set", "agreement_layers=0"]  # agreed on, the tiny budget leaves one page
    found = run_cli("ask", desk.text, QUESTION, "--json", "--pages", 2, *apart, *desk.options).json
    text = desk.text.read_text(encoding="utf-8")
    assert len(found["pages"]) == 2
    for page in found["pages"]:
        assert set(page) == {"page", "start_char", "end_char", "score", "text"}
        assert text[page["start_char"] : page["end_char"]] == page["text"] != ""


def test_several_questions_give_a_list_in_order(desk: Desk) -> None:
    found = run_cli("ask", desk.text, QUESTION, "Who spoke?", "--json", *desk.options).json
    single = run_cli("ask", desk.text, "Who spoke?", "--json", *desk.options).json
    assert [entry["question"] for entry in found] == [QUESTION, "Who spoke?"]
    assert found[1]["answer"] == single["answer"]


def test_ask_reads_standard_input(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO(desk.text.read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(data, encoding="utf-8"))
    piped = run_cli("ask", "-", QUESTION, "--json", *desk.options).json
    assert piped["answer"] == run_cli("ask", desk.text, QUESTION, "--json", *desk.options).json["answer"]


def test_options_reach_the_engine(desk: Desk) -> None:
    more = ["--method", "mean_key", "--kv-budget", "128", "--device-kv-gb", "0.1", "--set", "num_local_pages=2"]
    found = run_cli("ask", desk.text, QUESTION, "--json", *desk.options, *more).json
    assert (found["method"], found["kv_budget"]) == ("mean_key", 128)
    assert found["kv_bytes"]["host"] > 0


def test_chat_answers_each_line_and_remembers(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\nAnd then?\n/quit\nnever asked\n"))
    outcome = run_cli("chat", desk.text, "--json", *desk.options)
    turns = [json.loads(line) for line in outcome.out.splitlines()]
    lm = RetroLM.from_pretrained(desk.model, kv_budget=96, page_size=16)
    conversation = lm.read(desk.text).conversation()
    expected = [conversation.ask(question, max_new_tokens=4).text for question in (QUESTION, "And then?")]
    assert outcome.code == 0
    assert [turn["answer"] for turn in turns] == expected
    assert turns[0].keys() >= KEYS


def test_chat_goes_on_after_a_question_that_is_too_long(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION * 20}\n{QUESTION}\n"))
    outcome = run_cli("chat", desk.text, *desk.options)
    assert outcome.code == 0
    assert outcome.err.count("error: ") == 1 and "kv_budget" in outcome.err
    assert outcome.out.strip()


def test_chat_streams_the_same_text(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    outcome = run_cli("chat", desk.text, *desk.options)
    answer = run_cli("ask", desk.text, QUESTION, "--json", *desk.options).json["answer"]
    assert outcome.out.strip() == answer


def test_chat_refuses_standard_input_as_text(desk: Desk) -> None:
    run_cli("chat", "-", *desk.options).refused_in_one_line("standard input")


def test_a_whole_page_of_options_works_with_html(desk: Desk, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<html><body><p>{desk.text.read_text(encoding='utf-8')}</p></body></html>", encoding="utf-8")
    assert run_cli("ask", page, QUESTION, "--json", *desk.options).json["num_pages"] > 3
