"""`retrolm kb`: every command through the command line, on a tiny model."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli_runner import Desk, run_cli
from retrolm.cli.startup import quick_imports
from retrolm.engine.model import RetroLM
from retrolm.knowledge_base.base import KnowledgeBase
from retrolm.knowledge_base.manifest import PAGES_FILE, read_manifest
from tiny_folder import write_story
from tiny_tokenizer import STORY

QUESTION = "What did the captain count?"


@pytest.fixture
def base(desk: Desk, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    made = run_cli("kb", "create", folder, *desk.options)
    assert made.code == 0, made.err
    return folder


def test_create_add_ask(base: Path, desk: Desk) -> None:
    added = run_cli("kb", "add", base, desk.text, "--meta", "year=1910", "--meta", "author=Jane", "--json").json
    assert added["added"][0]["status"] == "added" and added["failed"] == []
    found = run_cli("kb", "ask", base, QUESTION, "--max-new-tokens", 4, "--json").json
    fresh = run_cli("ask", desk.text, QUESTION, "--json", *desk.options).json
    for key in set(fresh) - {"pages", "prefill_s", "ttft_s", "tpot_s", "kv_bytes", "model"}:
        assert found[key] == fresh[key], key
    assert found["reuse"] == "exact" and found["page_bytes_read"] > 0
    text = desk.text.read_text(encoding="utf-8")
    for page, same in zip(found["pages"], fresh["pages"], strict=True):
        assert {key: page[key] for key in same} == same
        assert page["text"] == text[page["start_char"] : page["end_char"]]
        assert page["metadata"] == {"year": 1910, "author": "Jane"} and page["source"] == str(desk.text)
        assert page["layers"]


def test_plan_says_what_asking_takes(base: Path, desk: Desk) -> None:
    run_cli("kb", "add", base, desk.text)
    found = run_cli("kb", "plan", base, "--json").json
    entry = read_manifest(base).documents[0]
    assert (found["num_tokens"], found["num_pages"]) == (entry.num_tokens, entry.num_pages)
    assert found["kv_bytes"] == {"device": 0, "host": 0, "disk": entry.files[PAGES_FILE].bytes} and found["fits"]
    shown = run_cli("kb", "plan", base).out
    assert "memory peak" in shown and "reading anew" in shown


def test_a_file_whose_name_is_no_unicode_is_kept_and_shown(base: Path, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\x1b[2J.txt")
    Path(path).write_text(STORY)
    added = run_cli("kb", "add", base, path)
    assert added.code == 0 and "caf\ufffd\ufffd[2J.txt: added" in added.out, added.err
    listed = run_cli("kb", "list", base).out
    assert "\x1b" not in added.out + listed and "[2J.txt" in listed.replace("\n", "")


def test_ask_prints_the_answer_alone(base: Path, desk: Desk) -> None:
    run_cli("kb", "add", base, desk.text)
    outcome = run_cli("kb", "ask", base, QUESTION, "--max-new-tokens", 4)
    expected = RetroLM.from_pretrained(desk.model, kv_budget=96, page_size=16).read(desk.text)
    assert (outcome.code, outcome.out) == (0, expected.ask(QUESTION, max_new_tokens=4).text + "\n")
    assert "as it was read" in outcome.err and "of layers" in outcome.err


def test_several_documents_and_questions(base: Path, desk: Desk, tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text(STORY[60:])
    assert run_cli("kb", "add", base, desk.text, other).out.count("added") == 2
    both = run_cli("kb", "ask", base, QUESTION, "Who spoke?", "--json", "--max-new-tokens", 3).json
    assert [one["reuse"] for one in both] == ["composed", "composed"]
    assert both[0]["documents"] == [str(desk.text), str(other)]
    one = run_cli("kb", "ask", base, QUESTION, "--document", other, "--json", "--max-new-tokens", 3).json
    assert (one["reuse"], one["documents"]) == ("exact", [str(other)])
    passages = run_cli("kb", "query", base, QUESTION, "--top-k", 7).json
    assert len(passages) == 7 and passages[0]["score"] > 0 == passages[-1]["score"]
    assert len({(one["document"], one["page"]) for one in passages}) == 7
    assert {"document", "text", "page", "score", "layers"} <= set(passages[0])


def test_filters_and_standard_input(base: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(STORY[30:].encode()), encoding="utf-8"))
    assert run_cli("kb", "add", base, "-", "--name", "piped", "--meta", "year=1902").code == 0
    run_cli("kb", "add", base, desk.text, "--meta", "year=1910")
    found = run_cli("kb", "ask", base, QUESTION, "--where", "year<1905", "--json", "--max-new-tokens", 2).json
    assert found["documents"] == ["piped"]
    run_cli("kb", "ask", base, QUESTION, "--where", "year>2000").refused_in_one_line("No document meets")
    run_cli("kb", "ask", base, QUESTION, "--where", "year").refused_in_one_line("'year' is no condition", "field=value")


def test_list_info_remove_gc(base: Path, desk: Desk) -> None:
    run_cli("kb", "add", base, desk.text, "--name", "the story")
    (entry,) = run_cli("kb", "list", base, "--json").json
    assert entry["name"] == "the story" and entry["source"] == str(desk.text)
    assert "the story" in run_cli("kb", "list", base).out
    info = run_cli("kb", "info", base, "--json").json
    assert info["num_documents"] == 1 and info["fingerprint"]["kv_budget"] == 96 and info["bytes"] == entry["bytes"]
    assert str(desk.model) in run_cli("kb", "info", base).out
    run_cli("kb", "remove", base, "the stroy").refused_in_one_line("Did you mean 'the story'?")
    assert run_cli("kb", "remove", base, "the story").out == "removed the story\n"
    assert run_cli("kb", "gc", base, "--json").json["num_deleted"] == 1
    run_cli("kb", "ask", base, QUESTION).refused_in_one_line("holds no document yet")


def test_verify_names_what_is_wrong(base: Path, desk: Desk) -> None:
    run_cli("kb", "add", base, desk.text)
    assert run_cli("kb", "verify", base).code == 0
    entry = read_manifest(base).documents[0]
    path = base / "documents" / entry.id / PAGES_FILE
    data = bytearray(path.read_bytes())
    data[-9] ^= 16
    path.write_bytes(data)
    outcome = run_cli("kb", "verify", base)
    assert outcome.code == 1 and f"page {entry.num_pages - 1} of layer 2" in outcome.err
    report = run_cli("kb", "verify", base, "--json")
    assert report.code == 1 and not report.json["sound"] and report.json["problems"][0]["file"] == PAGES_FILE


def test_export_import_merge(base: Path, desk: Desk, tmp_path: Path) -> None:
    run_cli("kb", "add", base, desk.text)
    assert run_cli("kb", "export", base, tmp_path / "base.tar").code == 0
    assert run_cli("kb", "import", tmp_path / "base.tar", tmp_path / "copy").code == 0
    answers = [
        run_cli("kb", "ask", folder, QUESTION, "--max-new-tokens", 4).out for folder in (base, tmp_path / "copy")
    ]
    assert answers[0] == answers[1]
    run_cli("kb", "create", tmp_path / "new", *desk.options)
    assert run_cli("kb", "merge", tmp_path / "new", base, tmp_path / "copy", "--json").json["added"] == [str(desk.text)]
    run_cli("kb", "import", desk.text, tmp_path / "bad").refused_in_one_line("no file written by `retrolm kb export`")


def test_several_files_some_of_them_bad(base: Path, desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    outcome = run_cli("kb", "add", base, tmp_path / "binary.txt", desk.text, "--json")
    assert outcome.code == 1 and len(outcome.json["added"]) == 1
    assert outcome.json["failed"] == [str(tmp_path / "binary.txt")] and "binary" in outcome.err
    run_cli("kb", "add", base, tmp_path / "binary.txt").refused_in_one_line("binary.txt is binary")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["kb", "info", "{tmp}/nothing"], ["no knowledge base"]),
        (["kb", "ask", "{base}", " "], ["question is empty"]),
        (["kb", "ask", "{base}", "What?", "--first-layer", "resent"], ["resent", "Did you mean 'recent'?"]),
        (["kb", "add", "{base}", "{tmp}/none.txt"], ["There is no file"]),
        (["kb", "add", "{base}", "{text}", "--meta", "year"], ["--meta needs key=value"]),
        (["kb", "add", "{base}", "{text}", "--host-kv-gb", "0"], ["--host-kv-gb must be a positive number"]),
        (["kb", "add", "{base}", "{text}", "--host-kv-gb", "0.000001"], ["host_kv_bytes=1000 holds 0 pages"]),
        (["kb", "remove", "{base}"], ["Nothing to remove"]),
        (["kb", "create", "{base}"], ["knowledge base already"]),
        (["kb", "create", "{tmp}/new", "--method", "full"], ["full", "pages"]),
        (["kb", "rename", "{base}"], ["'rename'"]),
    ],
)
def test_mistakes_are_told_in_one_line(
    base: Path, desk: Desk, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    filled = [word.format(base=base, tmp=tmp_path, text=desk.text) for word in words]
    run_cli(*filled, *(desk.options if words[1] == "create" else [])).refused_in_one_line(*parts)


def test_the_host_cap_reaches_the_engine(base: Path, desk: Desk, tmp_path: Path) -> None:
    longer = write_story(tmp_path / "long.txt", 8)
    lm = RetroLM.from_pretrained(desk.model, kv_budget=96, page_size=16)
    cap = 12 * lm.page_layout().page_bytes * 3 / 1e9
    assert run_cli("kb", "add", base, longer, "--host-kv-gb", cap).code == 0
    found = KnowledgeBase.open(base).ask(QUESTION, max_new_tokens=4)
    assert found.answer.token_ids == lm.read(longer).ask(QUESTION, max_new_tokens=4).token_ids


def test_looking_at_a_base_loads_no_torch(base: Path, desk: Desk) -> None:
    run_cli("kb", "add", base, desk.text)
    program = (
        "import sys; from retrolm.cli.main import main\n"
        f"for word in ('list', 'info', 'verify', 'gc'):\n"
        f"    assert main(['kb', word, {str(base)!r}, '--json']) == 0, word\n"
        f"assert main(['kb', 'remove', {str(base)!r}, {str(desk.text)!r}]) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_garbage_collection_goes_on_after_imports() -> None:
    with pytest.raises(ValueError, match="stop"), quick_imports():
        assert not gc.isenabled()
        raise ValueError("stop")
    assert gc.isenabled()


def test_a_moved_model_is_named(base: Path, desk: Desk, tmp_path: Path) -> None:
    run_cli("kb", "add", base, desk.text)
    manifest = base / "manifest.json"
    assert json.loads(manifest.read_text())["content"]["setup"]["model"] == str(desk.model)
    moved = tmp_path / "moved"
    moved.symlink_to(desk.model)
    outcome = run_cli("kb", "ask", base, QUESTION, "--model", moved, "--max-new-tokens", 2)
    assert outcome.code == 0, outcome.err
