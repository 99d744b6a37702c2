"""Long documents from folders, Parquet files and the hub, in one fixed order."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from retrolm.errors import UserError
from retrolm.training.data.documents import read_documents
from retrolm.training.data.hub import read_hub_documents
from retrolm.training.data.rows import RowCounts
from retrolm.training.document_pieces import PieceStream
from stage2_run_maker import tiny_stage2_recipe
from tiny_tokenizer import STORY, tiny_tokenizer


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_parquet(tmp_path: Path) -> None:
    texts = ["one", None, "two", "two", "three"]
    path = write_parquet(tmp_path / "a.parquet", text=texts, title=list("abcde"), other=[1, 2, 3, 4, 5])
    counts = RowCounts()
    found = list(read_documents(path, counts))
    assert [(document.title, document.text) for document in found] == [("a", "one"), ("c", "two"), ("e", "three")]
    assert counts.skipped == {"empty": 1, "duplicate": 1}
    untitled = write_parquet(tmp_path / "b.parquet", text=["x"])
    assert [document.title for document in read_documents(untitled, RowCounts())] == [""]


def test_unreadable_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="No file"):
        list(read_documents(tmp_path / "none.parquet", RowCounts()))
    (tmp_path / "a.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        list(read_documents(tmp_path / "a.parquet", RowCounts()))
    with pytest.raises(UserError, match="no usable row"):
        list(read_documents(write_parquet(tmp_path / "b.parquet", words=["x"]), RowCounts()))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(read_documents(tmp_path / "b.parquet", RowCounts()))


def test_a_folder_of_all_kinds(tmp_path: Path) -> None:
    """Deeply, by path; what is no text is passed over."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("plain")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    (tmp_path / "a.jsonl").write_text('{"text": "lines"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x00")
    write_parquet(tmp_path / "d.parquet", text=["table"])
    found = [document.text for document in read_documents(tmp_path, RowCounts())]
    assert found == ["lines", "plain", "packed", "table"]


class FakeHub:
    """Stands in for the package `datasets`."""

    @staticmethod
    def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, str]]:
        if name != "some/books" or not streaming:
            raise FileNotFoundError(name)
        return [{"text": STORY * 3 + split, "meta": "x"}, {"text": ""}, {"text": STORY * 2}]


def test_hub_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub)
    counts = RowCounts()
    assert len(list(read_hub_documents("some/books", "train", counts))) == 2 and counts.skipped == {"empty": 1}
    config = tiny_stage2_recipe({"path": "", "hub": "some/books", "dev_path": "", "epochs": 2}).data
    pieces = [tiny_tokenizer().decode(piece) for piece in PieceStream(config, tiny_tokenizer(), tmp_path)]
    assert len(pieces) % 2 == 0 and json.dumps(pieces).count("train") == 2
    config = tiny_stage2_recipe({"path": "", "hub": "no/such", "dev_path": ""}).data
    with pytest.raises(UserError, match="Can't open data set 'no/such'"):
        next(iter(PieceStream(config, tiny_tokenizer(), tmp_path)))
