"""Looks over an installation: versions, devices, memory, disk, models, optional extras."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .catalogue import CATALOGUE
from .provenance import cpu_name
from .pull import cache_folder, is_pulled
from .shipped import shipped_retrievers

LOW_MEMORY_BYTES = 4 << 30
LOW_DISK_BYTES = 2 << 30


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Attributes:
        name: what was looked at. detail: what was found.
        state: "ok"; "note" = works, but something optional is missing; "bad" = RetroLM can't work like this.
        fix: what to do about it; empty where nothing is needed.
    """

    name: str
    state: str
    detail: str
    fix: str = ""


def diagnose() -> list[Finding]:
    """Look at everything RetroLM stands on."""
    return [_python(), *_libraries(), *_devices(), _memory(), _cache(), _models(), _retrievers(), *_extras()]


def _python() -> Finding:
    found, wanted = platform.python_version(), importlib.metadata.metadata("retrolm")["Requires-Python"]
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("python", "bad", f"{found} is outside {wanted}", "Use another Python.")
    return Finding("python", "ok", f"{found} ({sys.executable})")


def _libraries() -> Iterator[Finding]:
    """The installed version of each library RetroLM needs, against the range it asks for."""
    for requirement in _requirements(""):
        installed = _version(requirement.name)
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        if installed is None:
            yield Finding(requirement.name, "bad", "not installed", fix)
        elif not requirement.specifier.contains(installed, prereleases=True):
            yield Finding(requirement.name, "bad", f"{installed} is outside {requirement.specifier}", fix)
        else:
            yield Finding(requirement.name, "ok", installed)


def _devices() -> Iterator[Finding]:
    yield Finding("cpu", "ok", f"{cpu_name()}, {os.cpu_count()} cores, threads in use: {torch.get_num_threads()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(f"gpu {index}", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        detail = f"torch is built for CUDA {built}, but no GPU answers" if built else "this torch is a CPU build"
        yield Finding("gpu", "note", f"none: {detail}", "" if built is None else "Check the driver with nvidia-smi.")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
    if memory.available < LOW_MEMORY_BYTES:
        return Finding("memory", "note", detail, "Close programs; `retrolm plan FILE` says what a text takes.")
    return Finding("memory", "ok", detail)


def _cache() -> Finding:
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{folder}, {free / 2**30:.1f} GiB free"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        fix = "Set RETROLM_CACHE to a folder of your own."
        return Finding("cache folder", "bad", f"{folder} can't be written", fix)
    if free < LOW_DISK_BYTES:
        return Finding("cache folder", "note", detail, "Make room, or set RETROLM_CACHE to another disk.")
    return Finding("cache folder", "ok", detail)


def _models() -> Finding:
    pulled = [name for name in CATALOGUE if is_pulled(name)]
    if not pulled:
        return Finding("models", "note", "none pulled", "retrolm pull smollm2-135m-instruct")
    return Finding("models", "ok", ", ".join(pulled))


def _retrievers() -> Finding:
    names = [path.name for path in shipped_retrievers()]
    if not names:
        return Finding("trained retrievers", "note", "none shipped: bookmarks are untrained")
    return Finding("trained retrievers", "ok", ", ".join(names))


def _extras() -> Iterator[Finding]:
    """Which optional parts are there; a missing one is no fault."""
    for extra in importlib.metadata.metadata("retrolm").get_all("Provides-Extra") or []:
        missing = [wanted.name for wanted in _requirements(extra) if _version(wanted.name) is None]
        if missing:
            yield Finding(f"extra {extra}", "note", f"missing {', '.join(missing)}", f"pip install 'retrolm[{extra}]'")
        else:
            yield Finding(f"extra {extra}", "ok", "installed")


def _requirements(extra: str) -> list[Requirement]:
    """What the package requires at all (extra ""), or what only `extra` adds."""
    found = [Requirement(line) for line in importlib.metadata.requires("retrolm") or []]
    always = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [r for r in found if r not in always and r.marker and r.marker.evaluate({"extra": extra})]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
