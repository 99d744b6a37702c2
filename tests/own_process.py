"""Processes of a test's own, forked off one server that has imported the engine once for all of them.

What they run is found by its module's name, and sees nothing of what the test process has done. Where a process has to
begin with nothing imported, or its memory is measured, use `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest


def start(
    function: Callable[..., object], *arguments: object, environment: Mapping[str, str] | None = None
) -> tuple[Any, Connection]:
    """Start `function(*arguments)` in a process group of its own.

    Returns the process, and the reading end of a pipe with what it prints and then what it returns, or its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_eval"])
    reading, writing = context.Pipe(duplex=False)
    with pytest.MonkeyPatch.context() as patch:  # for the server, which starts with the first process
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        process = context.Process(target=_run, args=(writing, dict(environment or {}), function, arguments))
        process.start()
    writing.close()
    return process, reading


def _run(
    writing: Connection, environment: dict[str, str], function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    os.setsid()
    os.dup2(writing.fileno(), 1)
    os.dup2(writing.fileno(), 2)
    writing.close()
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **environment})
    try:
        found = function(*arguments)
    except BaseException:
        print(traceback.format_exc(), flush=True)
        os._exit(1)
    if found is not None:
        print(found, flush=True)


def printed(process: Any, reading: Connection) -> str:
    """What a started process prints in all; fails if it fails."""
    with os.fdopen(os.dup(reading.fileno())) as lines:
        text = lines.read()
    process.join()
    assert process.exitcode == 0, text
    return text


def run_until(function: Callable[..., object], arguments: list[str], kill_at: int | None) -> int:
    """Run, and kill the process, workers and all, when it has printed the line `kill_at`.

    Returns how it ended: a late kill may find it complete.
    """
    process, reading = start(function, *arguments)
    with os.fdopen(os.dup(reading.fileno())) as lines:
        for line in lines:
            if kill_at is not None and line.strip() == str(kill_at):
                os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return int(process.exitcode)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
