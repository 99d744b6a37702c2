"""`plan`: what it says beforehand is what reading then takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cli_runner import Desk, run_cli
from retrolm.engine import plan as planning
from retrolm.engine.memory import PeakMemory, release_free_memory
from retrolm.engine.model import RetroLM
from tiny_folder import save_tiny_model, write_story

EXACT = ("num_tokens", "num_pages", "model", "method", "retriever", "kv_budget", "page_size")


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--chunk-pages", "3"],
        ["--page-size", "7"],
        ["--device-kv-gb", "0.001"],
        ["--host-kv-gb", "0.001"],
        ["--host-kv-gb", "0.001", "--set", "store_bits=8"],
        ["--set", "prefix_page=false"],
        ["--set", "store_dtype=bfloat16"],
        ["--set", "bookmarks=visible"],
        ["--method", "mean_key", "--kv-budget", "600"],
    ],
)
def test_sizes_are_exactly_those_of_the_run(desk: Desk, more: list[str]) -> None:
    planned = run_cli("plan", desk.text, *desk.options, *more, "--json")
    asked = run_cli("ask", desk.text, "Who?", *desk.options, *more, "--json").json
    assert planned.code == 0
    assert {key: planned.json[key] for key in EXACT} == {key: asked[key] for key in EXACT}
    expected, taken = planned.json["kv_bytes"], asked["kv_bytes"]
    assert all(expected[place] == taken[place] for place in ("device", "host"))
    assert expected["disk"] <= taken["disk"] <= 1.5 * expected["disk"]  # the question's page, and whole blocks


def test_plan_shows_tokens_pages_time_and_memory(desk: Desk) -> None:
    outcome = run_cli("plan", desk.text, *desk.options)
    words = outcome.out.split()
    assert outcome.code == 0
    for row in ("tokens", "weights", "store", "working", "peak", "reading", "answering", "tokens/s"):
        assert row in words


@pytest.mark.parametrize("command", [["plan"], ["ask", "Who?"]])
def test_a_cap_on_host_memory_that_holds_too_little_is_refused(desk: Desk, command: list[str]) -> None:
    words = [command[0], str(desk.text), *command[1:], *desk.options, "--host-kv-gb"]
    run_cli(*words, "0.000001").refused_in_one_line("host_kv_bytes=1000 holds 0 pages")
    run_cli(*words, "-1").refused_in_one_line("--host-kv-gb must be a positive number of GB")


def test_plan_reads_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        pytest.fail("the text was read")

    monkeypatch.setattr(RetroLM, "read", read)
    assert run_cli("plan", desk.text, *desk.options).code == 0


def test_plan_says_if_the_memory_is_not_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    before = planning.look_around()
    monkeypatch.setattr(planning, "look_around", lambda: planning.Surroundings(before.program_bytes, 1000, 0))
    outcome = run_cli("plan", desk.text, *desk.options)
    assert outcome.code == 1 and "doesn't fit" in outcome.out


class Grown(NamedTuple):
    """Bytes above those of the program: as planned, and as measured."""

    planned: int
    measured: int


CAPS = [{}, {"device": 60_000_000}, {"host": 40_000_000}]


def test_memory_is_within_a_fifth_of_what_reading_takes(tmp_path: Path) -> None:
    """In a process of its own, with a model whose pages are large: 32 KiB per token, most of it in the store."""
    model = save_tiny_model(tmp_path / "model", num_hidden_layers=4, head_dim=128, num_key_value_heads=4)
    text = write_story(tmp_path / "text.txt", repeats=40)
    done = subprocess.run(
        [sys.executable, __file__, str(model), str(text)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [Grown(*pair) for pair in json.loads(done.stdout)]
    assert len(found) == len(CAPS) and min(grown.planned for grown in found) > 50_000_000
    for grown in found:
        assert grown.measured == pytest.approx(grown.planned, rel=0.2)


def _grown(model: str, text: Path, caps: dict[str, int]) -> Grown:
    release_free_memory()
    before = planning.look_around()
    options: dict[str, Any] = {"kv_budget": 256, "page_size": 32, "device_kv_bytes": caps.get("device")}
    lm = RetroLM.from_pretrained(model, **options)
    if "host" in caps:
        lm.use_disk_tier(text.parent, caps["host"])
    assert lm.format is not None
    found = planning.plan(lm, len(lm.format.encode(text.read_text(encoding="utf-8"))), "Who?", before)
    with PeakMemory() as memory:
        document = lm.read(text)
        document.ask("Who?", max_new_tokens=4)
    document.close()
    return Grown(found.host_bytes - before.program_bytes, memory.host_peak_bytes - before.program_bytes)


if __name__ == "__main__":
    print(json.dumps([_grown(sys.argv[1], Path(sys.argv[2]), caps) for caps in CAPS]))
