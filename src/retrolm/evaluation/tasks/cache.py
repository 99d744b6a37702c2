"""Generated sample sets on disk, so that every model and method sees the same ones without making them again."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import UserError
from .sample import EvalSample


def cached(
    cache_dir: Path | str | None, name: str, key: dict[str, Any], make: Callable[[], list[EvalSample]]
) -> list[EvalSample]:
    """Return the samples stored for `key`, or make and store them.

    Args:
        cache_dir: folder for the files, created if missing; `None` = make them anew.
        name: readable part of the file's name; may hold folders.
        key: everything the samples depend on, as JSON values; its hash is the other part of the name.
        make: builds the samples.

    Raises `UserError` for a file that can't be read back.
    """
    if cache_dir is None:
        return make()
    text = json.dumps(key, sort_keys=True)
    path = Path(cache_dir) / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl.gz"
    if path.exists():
        return _read(path)
    samples = make()
    _write(path, [key, *(sample.to_json() for sample in samples)])
    return samples


def _read(path: Path) -> list[EvalSample]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            next(file)
            return [EvalSample.from_json(json.loads(line)) for line in file]
    except (OSError, EOFError, StopIteration, ValueError, TypeError) as error:
        raise UserError(f"The stored samples in {path} can't be read ({error!r}). Delete the file.") from error


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as raw, gzip.open(raw, "wt", encoding="utf-8", compresslevel=4) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
