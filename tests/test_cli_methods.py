"""`ask` with a method of every kind, `--set METHOD.knob=value`, and `methods`."""

from __future__ import annotations

import pytest

from cli_runner import Desk, run_cli
from retrolm.cli.known_methods import known_methods

QUESTION = "Who spoke?"
METHODS = known_methods()
NO_WEIGHTS = [name for name in METHODS if not {"embedder", "weights"} & METHODS.get(name).describe()["knobs"].keys()]


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_ask_answers_with_every_method(desk: Desk, name: str) -> None:
    kind = METHODS.get(name)
    small = ["--set", f"{name}.chunk_tokens=16"] if kind.kind == "rag" else []
    outcome = run_cli("ask", desk.text, QUESTION, "--method", name, "--json", *small, *desk.options)
    found = outcome.json
    assert outcome.err == "" and found["method"] == name
    assert (found["num_pages"] > 0) == (kind.kind == "pages")
    assert found["num_tokens"] > 96 and set(found["attended_tokens"]) >= {"prefill", "decode"}
    if kind.has_budget and kind.prefill == "streaming":
        assert found["attended_tokens"]["prefill"] <= 96
    if kind.kind != "pages":
        assert len(found["attended_by_layer"]["decode"]) == 3


def test_ask_says_that_a_text_is_read_with_each_question(desk: Desk) -> None:
    outcome = run_cli("ask", desk.text, QUESTION, "Where?", "--method", "streaming_llm", *desk.options)
    assert outcome.code == 0 and outcome.out.count("\n") == 2
    assert "read anew with each question" in outcome.err and "method streaming_llm" in outcome.err
    dense = run_cli("ask", desk.text, QUESTION, "--method", "full", *desk.options)
    assert "no budget" in dense.err


def test_knobs_of_the_method_can_be_set(desk: Desk) -> None:
    few, many = (
        run_cli("ask", desk.text, QUESTION, "--method", "quest", "--set", f"quest.num_dense_layers={n}", "--json",
                *desk.options).json["attended_tokens"]
        for n in (0, 3)
    )  # fmt: skip
    assert "dense_layers" not in few and many["dense_layers"] > 96


@pytest.mark.parametrize(("method", "left"), [("quest", "dense layers"), ("razor_attention", "dense heads")])
def test_what_a_method_leaves_dense_is_said(desk: Desk, method: str, left: str) -> None:
    outcome = run_cli("ask", desk.text, QUESTION, "--method", method, *desk.options)
    assert outcome.code == 0 and f" in {left})" in outcome.err
    assert " in dense" not in run_cli("ask", desk.text, QUESTION, "--method", "tova", *desk.options).err


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("quest.pages=8", ("Unknown knob of method 'quest'", "Did you mean 'page'")),
        ("quest.page=big", ("quest.page='big' must be a whole number",)),
        ("quest.page=32", ("kv_budget=88 is too small for quest", "three pages")),
        ("questt.page=8", ("Unknown method 'questt'", "Did you mean 'quest'")),
        ("snapkv.window=8", ("sets a knob of 'snapkv'", "--method is 'quest'")),
        ("quest.page", ("needs METHOD.knob=value",)),
    ],
)
def test_knobs_that_make_no_sense_are_refused(desk: Desk, setting: str, parts: tuple[str, ...]) -> None:
    options = [*desk.options, "--kv-budget", "88", "--method", "quest", "--set", setting]
    run_cli("ask", desk.text, QUESTION, *options).refused_in_one_line(*parts)


@pytest.mark.parametrize("command", ["chat", "plan", "verify", "bench", "demo"])
def test_commands_on_pages_refuse_other_methods(desk: Desk, command: str) -> None:
    file = [desk.text] if command in ("chat", "plan") else []
    outcome = run_cli(command, *file, "--method", "streaming_llm", *desk.options)
    outcome.refused_in_one_line(f"`retrolm {command}` works on pages", "--method streaming_llm has none", "retrolm")


def test_methods_says_what_each_keeps_and_spends() -> None:
    found = {entry["name"]: entry for entry in run_cli("methods", "--json").json}
    assert list(found) == list(METHODS)
    for entry in found.values():
        texts = [entry[key] for key in ("kind", "prefill", "budget_split", "keeps", "positions", "exact_when", "paper")]
        assert all(isinstance(text, str) and text for text in texts)
    assert found["streaming_llm"]["knobs"] == {"num_sink": 4}
    shown = run_cli("methods").out
    assert "4 sinks + the rest recent tokens" in shown and "infllm" in shown
