"""Adapters by name: shipped ones, "auto", wrong backbones; `retrolm adapter`; the demo's default."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from cli_runner import Desk, run_cli
from retrolm.cli import demo
from retrolm.engine import shipped_adapters
from retrolm.engine.adapter import SMALL_WEIGHTS_FILE, WEIGHTS_FILE, AdapterCard, new_adapter
from retrolm.engine.model import RetroLM
from retrolm.engine.push import push_adapter
from retrolm.errors import UserError
from test_push import FakeHub
from tiny_folder import save_tiny_model

MOST_BYTES = 5_000_000
PACKAGED = shipped_adapters.shipped_adapters()
SMALL: dict[str, Any] = {"kv_budget": 96, "page_size": 16}


@pytest.fixture
def shipped(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped adapters with one for the desk's model, called tiny."""
    lm = RetroLM.from_pretrained(desk.model, **SMALL)
    adapter = new_adapter(lm.backbone, "all", 2, 4.0, AdapterCard(lm.backbone.fingerprint(), "tiny", {"step": 3}))
    for pair in adapter.pairs:
        pair.up.data.fill_(0.3)  # type: ignore[operator, union-attr]
    adapter.save(tmp_path / "shipped" / "tiny", 32)
    monkeypatch.setattr(shipped_adapters, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped" / "tiny"


def test_each_way_to_name_one(desk: Desk, shipped: Path, tmp_path: Path) -> None:
    for name in ("auto", "tiny", shipped, str(shipped)):
        lm = RetroLM.from_pretrained(desk.model, adapter=name, **SMALL)
        assert lm.adapter is not None and lm.adapter.card.name == "tiny"
    assert RetroLM.from_pretrained(desk.model, adapter="none", **SMALL).adapter is None
    other = save_tiny_model(tmp_path / "other", num_key_value_heads=4)
    assert RetroLM.from_pretrained(other, adapter="auto", **SMALL).adapter is None
    with pytest.raises(UserError, match=r"trained for another backbone .*num_kv_heads: adapter has 2, model has 4"):
        RetroLM.from_pretrained(other, adapter="tiny", **SMALL)
    with pytest.raises(UserError, match=r"No adapter 'tinny': neither a folder .* shipped one \(tiny\)"):
        RetroLM.from_pretrained(desk.model, adapter="tinny", **SMALL)


def test_answers_under_auto_are_those_under_the_folder(desk: Desk, shipped: Path) -> None:
    words = ["ask", desk.text, "What is late?", *desk.options, "--json", "--adapter"]
    plain, auto, folder = (run_cli(*words, name).json["answer"] for name in ("none", "auto", shipped))
    assert auto == folder != plain


def test_the_command(shipped: Path, tmp_path: Path) -> None:
    found = run_cli("adapter", "info", "tiny", "--json").json
    assert (found["name"], found["rank"], found["alpha"], found["num_modules"]) == ("tiny", 2, 4.0, 21)
    assert found["details"] == {"step": 3, "bits": 32} and found["backbone"]["num_layers"] == 3
    assert "weights_bytes" in run_cli("adapter", "info", shipped).out
    small = run_cli("adapter", "export", "tiny", "--out", tmp_path / "small", "--json").json
    assert small["bytes"] < small["bytes_before"] and small["bits"] == 8
    assert (tmp_path / "small" / SMALL_WEIGHTS_FILE).is_file()
    again = run_cli("adapter", "export", tmp_path / "small", "--bits", 16, "--out", tmp_path / "again")
    assert again.code == 0 and (tmp_path / "again" / WEIGHTS_FILE).is_file()
    run_cli("adapter", "export", shipped, "--out", shipped).refused_in_one_line("is the adapter itself")
    run_cli("adapter", "info", "nothing").refused_in_one_line("No adapter 'nothing'")
    (shipped / "card.json").write_text('{"colour": 1}')
    run_cli("adapter", "info", shipped).refused_in_one_line("is no card of an adapter")


def test_upload(shipped: Path) -> None:
    hub = FakeHub()
    plan = push_adapter(shipped, "me/mine", private=True, api=hub)
    ((repo_id, files, message),) = hub.commits
    assert repo_id == "me/mine" and message == "Adapter tiny" and files.keys() == plan.files.keys()
    assert files.keys() == {"README.md", "card.json", "adapter_config.json", WEIGHTS_FILE}
    assert b"--adapter my-adapter" in files["README.md"]
    assert "README.md" in run_cli("adapter", "push", shipped, "me/mine", "--dry-run").out


def test_evaluation_takes_names_and_refuses_auto_without_one(desk: Desk, shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": desk.text.read_text()}) + "\n")
    words = ["eval", "loss", tmp_path / "held_out.jsonl", "--page-size", 16, "--kv-budget", 96, "--length", 120]
    rows = run_cli(*words, "--method", "full", "--model", desk.model, "--adapter", "auto", "--json").json
    assert [row["adapter"] for row in rows] == ["tiny"]
    other = save_tiny_model(tmp_path / "other", num_key_value_heads=4)
    run_cli(*words, "--model", other, "--adapter", "auto").refused_in_one_line("No adapter is shipped for this model")


def test_the_demo_takes_the_shipped_one() -> None:
    assert inspect.signature(demo.command).parameters["adapter"].default == "auto"


def check_shipped(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES
    card = json.loads((folder / "card.json").read_text())
    assert card["backbone"] and {"recipe", "measured", "licence"} <= card["details"].keys()


def test_shipped_ones_are_small_and_say_what_they_bring(shipped: Path) -> None:
    """Those of the package, if there are any; an adapter as training leaves it isn't fit to be shipped."""
    with pytest.raises(AssertionError):
        check_shipped(shipped)
    for folder in PACKAGED:
        check_shipped(folder)
