"""Where a measurement was taken: commit, versions, hardware, command."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGE = Path(__file__).parent.parent
LIBRARIES = ("retrolm", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def provenance(command: Sequence[str] = ()) -> dict[str, Any]:
    """Facts that belong beside every measured number: commit, versions, hardware, command, time (UTC)."""
    return {
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "command": shlex.join(command),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """Commit of the source checkout this package runs from, "-dirty" if files differ; None if it runs from none."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top) / "src" / "retrolm" != PACKAGE.resolve():
        return None
    head = _git("rev-parse", "HEAD")
    return f"{head}-dirty" if head and _git("status", "--porcelain", "--untracked-files=no") else head


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def hardware() -> dict[str, Any]:
    """Processor, threads in use, memory and GPUs of this machine."""
    return {
        "cpu": cpu_name(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def cpu_name() -> str:
    """Name of the processor as the system states it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
