"""A disk that is full ends a training with one line, and leaves no part of a checkpoint behind."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from retrolm.cli.boundary import _explain
from retrolm.training import checkpoint
from retrolm.training.checkpoint import TrainState, save_state
from retrolm.training.data import pool
from retrolm.training.data.rows import Document
from retrolm.training.stage2 import split


@pytest.mark.parametrize(("free", "kind"), [(1000, OSError), (1 << 40, RuntimeError)])
def test_a_checkpoint_that_does_not_fit(
    free: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(value: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 192 vs 80")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(kind) as raised:
        save_state(tmp_path, TrainState(1, {}, {}, {}, 0, 0.0))
    assert not list(tmp_path.iterdir())
    assert getattr(raised.value, "errno", None) == (errno.ENOSPC if kind is OSError else None)


def test_other_libraries_words_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert _explain(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")) == 2
    assert "No space left on the disk" in capsys.readouterr().err


def test_data_files_leave_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts() -> Iterator[Document]:
        yield Document("a", "text")
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        split._write(tmp_path / "train.jsonl.gz", texts())
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match="No space"):
        pool._write_atomically(tmp_path / "books.npy", b"0")
    assert not list(tmp_path.iterdir())
