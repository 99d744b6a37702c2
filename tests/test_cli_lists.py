"""`models`, `methods`, `doctor`, `retriever info`, `pull`: what they show, and the same as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_runner import Outcome, run_cli
from retrolm.engine import doctor
from retrolm.engine.catalogue import CATALOGUE
from retrolm.methods import METHODS
from retrolm.retriever import PageRetriever, ProjectionShape, RetrieverCard


def test_models_says_which_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROLM_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "gemma-3-270m"
    folder.mkdir(parents=True)
    (folder / "retrolm_model.json").write_text("{}")
    found = {entry["name"]: entry for entry in run_cli("models", "--json").json}
    assert set(found) == set(CATALOGUE)
    assert [name for name, entry in found.items() if entry["pulled"]] == ["gemma-3-270m"]
    assert found["gemma-3-270m"]["folder"] == str(folder)
    assert all(entry["licence"] and entry["licence_note"] for entry in found.values())
    shown = run_cli("models").out
    assert all(name in shown for name in CATALOGUE)


def test_methods_lists_all_with_their_papers() -> None:
    found = run_cli("methods", "--json").json
    assert [entry["name"] for entry in found] == list(METHODS)
    assert all(entry["paper"].startswith("https://") and entry["summary"] for entry in found)
    shown = run_cli("methods").out.splitlines()
    assert [line.split(" · ")[0] for line in shown if line[0] != " "] == list(METHODS)
    assert all(f"  {entry['paper']}" in shown for entry in found), "addresses stand whole on their lines"


def test_doctor_finds_this_installation_healthy() -> None:
    outcome = run_cli("doctor", "--json")
    assert outcome.code == 0 and outcome.json["healthy"]
    findings = {entry["name"]: entry for entry in outcome.json["findings"]}
    assert findings["torch"]["detail"] == torch.__version__
    assert {"python", "transformers", "cpu", "memory", "cache folder", "models", "extra gguf"} <= findings.keys()


def test_doctor_fails_where_a_library_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "4.0.0" if name == "transformers" else real(name))
    outcome = run_cli("doctor")
    assert outcome.code == 1
    assert "4.0.0 is outside" in outcome.out and "pip install 'transformers" in outcome.out


def test_doctor_notes_a_missing_extra_but_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "gguf" else real(name))
    outcome = run_cli("doctor", "--json")
    findings = {entry["name"]: entry for entry in outcome.json["findings"]}
    assert outcome.code == 0
    assert findings["extra gguf"]["state"] == "note"
    assert findings["extra gguf"]["fix"] == "pip install 'retrolm[gguf]'"


def test_doctor_fails_where_the_cache_folder_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETROLM_CACHE", str(tmp_path / "file" / "cache"))
    outcome = run_cli("doctor")
    assert outcome.code == 1 and "RETROLM_CACHE" in outcome.out


def _saved_retriever(folder: Path) -> Path:
    shapes = [ProjectionShape(0, "q_proj", 8, 8)]
    card = RetrieverCard({"model_type": "llama"}, rank=2, page_size=64, name="tiny", details={"recall": {"8K": 0.5}})
    return PageRetriever(shapes, torch.zeros(8), card).save(folder)


def test_retriever_info_shows_the_card(tmp_path: Path) -> None:
    folder = _saved_retriever(tmp_path / "r")
    found = run_cli("retriever", "info", folder, "--json").json
    assert (found["name"], found["rank"], found["page_size"]) == ("tiny", 2, 64)
    assert found["backbone"] == {"model_type": "llama"}
    assert found["weights_bytes"] == (folder / "retriever.safetensors").stat().st_size
    shown = run_cli("retriever", "info", folder).out
    assert "name: tiny" in shown and "    8K: 0.5" in shown


def test_retriever_info_refuses_what_is_none(tmp_path: Path) -> None:
    run_cli("retriever", "info", tmp_path).refused_in_one_line(str(tmp_path))
    folder = _saved_retriever(tmp_path / "r")
    (folder / "card.json").write_text(json.dumps({"format_version": 999}))
    run_cli("retriever", "info", folder).refused_in_one_line("card.json")


@pytest.fixture
def pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `pull` that only makes the folder."""
    monkeypatch.setenv("RETROLM_CACHE", str(tmp_path))

    def pull(name: str, *, progress: Any) -> Path:
        progress("download 1/1", 0, 10)
        progress("convert", 0, 0)
        return tmp_path / "models" / name

    monkeypatch.setattr("retrolm.engine.pull.pull", pull)
    return tmp_path / "models"


def test_pull_says_where_the_model_is_and_its_licence(pulled: Path) -> None:
    outcome = run_cli("pull", "gemma-3-270m")
    assert outcome == Outcome(0, f"gemma-3-270m is ready: {pulled / 'gemma-3-270m'}\n", outcome.err)
    assert "Gemma" in outcome.err


def test_pull_as_json(pulled: Path) -> None:
    found = run_cli("pull", "gemma-3-270m", "--json").json
    assert found["folder"] == str(pulled / "gemma-3-270m")
    assert found["was_here"] is False and found["licence"] == "Gemma"


def test_pull_suggests_the_name_meant() -> None:
    run_cli("pull", "gemma-3-207m").refused_in_one_line("Did you mean 'gemma-3-270m'?")
