"""Bad input: one clear line, exit code 2 (130 for Ctrl-C), nothing half-written, and no long work before it."""

from __future__ import annotations

import errno
import functools
import logging
import os
import pty
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_runner import Desk, run_cli
from retrolm.cli import output_file
from retrolm.engine.model import RetroLM
from tiny_folder import write_story

QUESTION = "What did the captain count?"
FILES: dict[str, tuple[bytes | None, str]] = {
    "missing.txt": (None, "no file"),
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n\t\n ", "only whitespace"),
    "binary.txt": (b"\x7fELF\0\0\1\2", "binary"),
    "latin1.txt": ("café".encode("latin-1"), "not UTF-8"),
    "damaged.pdf": (b"%PDF-1.7 and then nothing of use", "PDF"),
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder_that_stays_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    empty = tmp_path / "here"
    empty.mkdir()
    monkeypatch.chdir(empty)
    yield
    assert not list(empty.iterdir())


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a text is read."""

    def read(*_: Any, **__: Any) -> None:
        pytest.fail("the text was read before the request was refused")

    monkeypatch.setattr(RetroLM, "read", read)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["ask", "chat", "plan"])
def test_unreadable_files(desk: Desk, tmp_path: Path, name: str, command: str, no_reading: None) -> None:
    data, part = FILES[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    question = [QUESTION] if command == "ask" else []
    run_cli(command, tmp_path / name, *question, *desk.options).refused_in_one_line(name, part)


def test_a_folder_is_no_text(desk: Desk, no_reading: None) -> None:
    run_cli("ask", desk.folder, QUESTION, *desk.options).refused_in_one_line("folder")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--kv-budget", "47"], ["kv_budget=47", "at least 48"]),
        (["--kv-budget", "-1"], ["kv_budget"]),
        (["--kv-budget", "4096"], ["window", "1024"]),
        (["--page-size", "0"], ["page_size"]),
        (["--page-size", "-16"], ["page_size"]),
        (["--chunk-pages", "-1"], ["chunk_pages"]),
        (["--device-kv-gb", "0"], ["--device-kv-gb"]),
        (["--device-kv-gb", "nan"], ["--device-kv-gb"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--dtype", "floot32"], ["'floot32'", "Did you mean 'float32'?"]),
        (["--method", "mean_keys"], ["'mean_keys'", "Did you mean 'mean_key'?"]),
        (["--model", "smollm2-135m-instrct"], ["'smollm2-135m-instrct'", "Did you mean 'smollm2-135m-instruct'?"]),
        (["--model", "/no/such/folder"], ["/no/such/folder"]),
        (["--retriever", "/no/such/folder"], ["/no/such/folder"]),
        (["--set", "retrive_every=3"], ["'retrive_every'", "Did you mean 'retrieve_every'?"]),
        (["--set", "retrieve_every"], ["key=value"]),
        (["--set", "retrieve_every=often"], ["retrieve_every", "whole number"]),
        (["--set", "strict_budget=perhaps"], ["strict_budget", "true or false"]),
        (["--set", "first_layer_mode=recnt"], ["recnt", "Did you mean 'recent'?"]),
        (["--set", "retrieve_every=1", "--set", "retrieve_every=2"], ["given twice"]),
        (["--set", "kv_budget=96"], ["--kv-budget"]),
    ],
)
def test_bad_options(desk: Desk, words: list[str], parts: list[str], no_reading: None) -> None:
    run_cli("ask", desk.text, QUESTION, *desk.options, *words).refused_in_one_line(*parts)


def test_a_device_cap_under_one_set_of_pages(desk: Desk) -> None:
    words = [*desk.options, "--device-kv-gb", "0.0000001"]
    run_cli("ask", desk.text, QUESTION, *words).refused_in_one_line("device_kv_bytes=100", "at least")


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question(desk: Desk, question: str, no_reading: None) -> None:
    run_cli("ask", desk.text, QUESTION, question, *desk.options).refused_in_one_line("question")


def test_a_question_longer_than_the_budget_is_refused_before_reading(desk: Desk, no_reading: None) -> None:
    run_cli("ask", desk.text, QUESTION * 20, *desk.options).refused_in_one_line("kv_budget=96", "Shorten it")


def test_a_model_that_is_not_pulled_says_how_to_get_it(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROLM_CACHE", str(tmp_path))
    run_cli("ask", desk.text, QUESTION).refused_in_one_line("retrolm pull smollm2-135m-instruct")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(desk: Desk, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "figures.json"
    target.write_text("before")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(output_file.os, "fdopen", full)
    words = ["--lengths", "40", "--repeats", "1", "--verify-tokens", "77", "--output", target]
    run_cli("bench", *desk.options, *words).refused_in_one_line("No space left", "figures.json")
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.glob("*figures*")] == ["figures.json"]


@pytest.mark.parametrize("kind", ["folder", "no_folder", "closed"])
def test_an_output_file_is_refused_before_the_work(desk: Desk, tmp_path: Path, kind: str, no_reading: None) -> None:
    if kind == "closed" and os.getuid() == 0:
        kind = "folder"  # root may write anywhere
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    target = {"folder": tmp_path, "no_folder": tmp_path / "none" / "x.json", "closed": closed / "x.json"}[kind]
    run_cli("bench", *desk.options, "--output", target).refused_in_one_line("folder")


def test_an_unexpected_error_is_one_line_that_names_the_debug_flag(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(RetroLM, "read", broken)
    words = ["ask", desk.text, QUESTION, *desk.options]
    run_cli(*words).refused_in_one_line("RuntimeError: first line second line", "--debug", code=1)
    outcome = run_cli(*words, "--debug")
    assert outcome.code == 1
    assert "Traceback" in outcome.err and "in broken" in outcome.err


def test_an_interrupted_download_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(name: str, **_: Any) -> None:
        raise KeyboardInterrupt(f"Pull of {name} stopped; the next one goes on from here.")

    monkeypatch.setattr("retrolm.engine.pull.pull", stopped)
    run_cli("pull", "gemma-3-270m").refused_in_one_line("goes on from here", code=130)


def test_ctrl_c_during_a_read(desk: Desk, tmp_path: Path) -> None:
    """The real program in a terminal of its own: stopped while its progress bar moves."""
    long_text = write_story(tmp_path / "long.txt", repeats=150)
    words = [sys.executable, "-m", "retrolm.cli.main", "ask", str(long_text), QUESTION, *desk.options]
    master, slave = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
    # A suite that a shell runs in the background ignores the signal, and so would what it starts.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=slave, env=environment, preexec_fn=heed)
    os.close(slave)
    screen = _read_until(master, b"Reading", seconds=60)
    process.send_signal(signal.SIGINT)
    screen += _read_until(master, b"Interrupted.", seconds=60)  # a full terminal would hold the program up
    out, _ = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == 130, screen
    assert b"Interrupted." in screen and b"Traceback" not in screen
    assert out == b""


def _read_until(descriptor: int, wanted: bytes, seconds: float) -> bytes:
    found, deadline = b"", time.monotonic() + seconds
    while wanted not in found and time.monotonic() < deadline:
        try:
            found += os.read(descriptor, 4096)
        except OSError:  # the other end has closed
            break
    return found


def test_library_warnings_show_only_with_debug(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RetroLM.read

    def read(self: RetroLM, *arguments: Any, **options: Any) -> Any:
        warnings.warn("an idle remark", stacklevel=1)
        logging.getLogger("some.library").warning("an idle remark")
        return real(self, *arguments, **options)

    monkeypatch.setattr(RetroLM, "read", read)
    words = ["ask", desk.text, QUESTION, *desk.options]
    with pytest.warns(UserWarning, match="an idle remark"):
        assert run_cli(*words, "--debug").code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_cli(*words).code == 0
    assert logging.root.manager.disable == logging.NOTSET
