"""kill -9 while a base is written: nothing finished is lost, nothing half-finished is seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "kb_crash_worker.py"


@pytest.mark.parametrize(
    "options", [["--trials", "20"], ["--trials", "40", "--steps"]], ids=["at random times", "at each step"]
)
def test_killed_writers_lose_nothing(options: list[str], tmp_path: Path) -> None:
    """The worker needs no torch, so that it is killed while it writes, not while it loads."""
    command = [sys.executable, str(WORKER), str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{options[1]} writers killed" in done.stdout


def test_the_check_sees_a_loss(tmp_path: Path) -> None:
    """What the worker asserts can fail: a document that was told as finished and is gone."""
    program = (
        "from pathlib import Path; import kb_plain, kb_crash_worker\n"
        f"base = kb_plain.base_of(Path({str(tmp_path / 'base')!r}), 'one', 'two')\n"
        "kb_crash_worker.check(base, ['99 a,b'], 'here')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=WORKER.parent
    )
    assert "a finished change is lost" in done.stderr
