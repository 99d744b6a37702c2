"""Runs the command line inside the test process, and says what a user would see."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from retrolm.cli import screen
from retrolm.cli.main import main

WIDTH = 200


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of one run."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def refused_in_one_line(self, *parts: str, code: int = 2) -> None:
        """Fail unless the run ended in `code` with one line of error that has all `parts`, and nothing on stdout."""
        assert self.code == code, self
        assert self.out == ""
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        for part in parts:
            assert part in self.err


def run_cli(*arguments: object) -> Outcome:
    """Run `retrolm` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    screen.OUT.width = screen.ERR.width = WIDTH  # a console takes its width when it is made, whatever test comes first
    wide = mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH)})
    with wide, redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Desk:
    """A folder with a tiny model and a text, and the options that make both fit."""

    folder: Path
    model: Path
    text: Path

    @property
    def options(self) -> list[str]:
        return ["--model", str(self.model), "--kv-budget", "96", "--page-size", "16", "--max-new-tokens", "4"]
