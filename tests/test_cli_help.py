"""The command table: fast help, lazy imports, exit codes of usage errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cli_runner import run_cli
from retrolm import __version__
from retrolm.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "numpy", "safetensors")


def test_help_imports_nothing_heavy() -> None:
    """The help of every command, one after the other in a fresh process."""
    program = (
        "import sys; from retrolm.cli.main import COMMANDS, main\n"
        "for name in ('', *COMMANDS):\n"
        "    assert main([name, '--help'] if name else []) == 0\n"
        f"    heavy = [m for m in {HEAVY} if m in sys.modules]\n"
        "    assert not heavy, (name, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"retrolm {name} " in done.stdout for name in COMMANDS)


def test_help_lists_every_command() -> None:
    outcome = run_cli("--help")
    for name, (_, summary) in COMMANDS.items():
        assert name in outcome.out and summary[:20] in outcome.out


def test_no_arguments_show_help() -> None:
    assert run_cli() == run_cli("--help")


def test_version() -> None:
    assert run_cli("--version").out == f"retrolm {__version__}\n"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["aks", "file", "question"], ["'aks'", "Did you mean 'ask'?", "retrolm --help"]),
        (["ask"], ["FILE", "retrolm ask --help"]),
        (["ask", "file"], ["QUESTION"]),
        (["ask", "file", "question", "--kv-bugdet", "3"], ["--kv-bugdet", "--kv-budget"]),
        (["ask", "file", "question", "--kv-budget", "many"], ["--kv-budget", "integer"]),
        (["ask", "file", "question", "--pages", "-1"], ["--pages"]),
        (["retriever"], ["retrolm retriever --help"]),
        (["retriever", "inof", "x"], ["'inof'"]),
        (["bench", "--repeats", "0"], ["--repeats"]),
    ],
)
def test_usage_errors_are_one_line(words: list[str], parts: list[str]) -> None:
    run_cli(*words).refused_in_one_line(*parts)
