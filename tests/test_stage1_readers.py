"""Readers of stage-1 data: every format, and damaged, empty, duplicate and unusable rows."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.training.data.documents import read_documents
from retrolm.training.data.hub import read_hub_pairs
from retrolm.training.data.lines import json_array
from retrolm.training.data.readers import read_pairs
from retrolm.training.data.rows import RowCounts, content_hash

GOOD = {"query": "Who wrote it?", "pos": ["Ada wrote it."], "neg": ["Bob read it.", "Eve lost it."]}


def lines_file(folder: Path, *lines: str, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path, format_name: str) -> tuple[list, RowCounts]:
    counts = RowCounts()
    return list(read_pairs(path, format_name, "src", counts)), counts


def test_flagembedding_rows(tmp_path: Path) -> None:
    rows, counts = read(lines_file(tmp_path, json.dumps(GOOD)), "flagembedding")
    assert (rows[0].query, rows[0].positives[0].text) == ("Who wrote it?", "Ada wrote it.")
    assert [passage.text for passage in rows[0].negatives] == GOOD["neg"] and counts.kept == 1


def test_bad_rows_are_counted_by_reason(tmp_path: Path) -> None:
    path = lines_file(
        tmp_path,
        json.dumps(GOOD),
        json.dumps({**GOOD, "query": "who  WROTE it?"}),
        "{broken",
        "[1, 2]",
        json.dumps({**GOOD, "query": "  "}),
        json.dumps({**GOOD, "pos": []}),
        json.dumps({**GOOD, "pos": [""], "query": "other"}),
        json.dumps({"query": 3, "pos": "text"}),
        "",
    )
    rows, counts = read(path, "flagembedding")
    assert len(rows) == counts.kept == 1
    assert dict(counts.skipped) == {
        "duplicate": 1,
        "not JSON": 1,
        "not a JSON object": 1,
        "empty": 2,
        "without a positive": 2,
    }


def test_all_bad_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no usable row \(2 not JSON\)"):
        read(lines_file(tmp_path, "{", "}"), "flagembedding")


def test_missing_file_and_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No file"):
        read(tmp_path / "none.jsonl", "flagembedding")
    with pytest.raises(UserError, match="Did you mean 'squad'"):
        read(tmp_path, "sqad")


def test_truncated_gzip_keeps_what_is_whole(tmp_path: Path) -> None:
    rows = [json.dumps({**GOOD, "query": f"question {n} {content_hash(str(n))}"}) for n in range(500)]
    whole = gzip.compress("\n".join(rows).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found, counts = read(tmp_path / "cut.jsonl.gz", "flagembedding")
    assert 0 < len(found) < 500
    assert counts.skipped["damaged file cut.jsonl.gz"] == 1


def test_squad(tmp_path: Path) -> None:
    questions = [
        {"id": "1", "question": "When?", "answers": [{"text": "1901", "answer_start": 3}]},
        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
    ]
    content = {"data": [{"title": "Big_Event", "paragraphs": [{"context": "In 1901 it was.", "qas": questions}]}]}
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(content))
    (row,), counts = read(path, "squad")
    assert (row.positives[0].title, row.answers) == ("Big Event", ("1901",))
    assert counts.skipped == {"unanswerable": 1}
    path.write_text("[]")
    with pytest.raises(UserError, match="SQuAD format"):
        read(path, "squad")


DPR = {
    "question": "who",
    "answers": ["Ada"],
    "positive_ctxs": [{"title": "T", "text": "It was Ada."}],
    "hard_negative_ctxs": [{"title": "U", "text": "It was Bob."}, "noise", {"title": "V", "text": ""}],
}


def test_squad_with_parts_of_a_wrong_type(tmp_path: Path) -> None:
    good = {"id": 1, "question": "Who?", "answers": [{"text": "Ada"}, "Bob"]}
    paragraphs = [
        {"context": "Ada did.", "qas": [good, 7]},
        {"context": "", "qas": [good]},
        {"context": "No questions."},
    ]
    articles = [{"paragraphs": paragraphs}, "text", {"paragraphs": None}, {}]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": articles}))
    rows, counts = read(path, "squad")
    assert [(row.query, row.answers) for row in rows] == [("Who?", ("Ada",))]
    assert dict(counts.skipped) == {"not a JSON object": 4, "without a positive": 1}


def test_squad_that_breaks_off(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"data": [{"paragraphs": []}] * 50}).encode())
    for damaged in (whole[:-12], b"no gzip", whole[:12] + b"\x00" * 20):
        (tmp_path / "squad.json.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="is not JSON"):
            read(tmp_path / "squad.json.gz", "squad")


@pytest.mark.parametrize("as_array", [True, False])
def test_dpr(tmp_path: Path, as_array: bool) -> None:
    other = {**DPR, "question": "who else"}
    text = json.dumps([DPR, 7, other], indent=1) if as_array else f"{json.dumps(DPR)}\n{json.dumps(other)}"
    path = tmp_path / "dpr.json"
    path.write_text(text)
    rows, counts = read(path, "dpr")
    assert [row.query for row in rows] == ["who", "who else"]
    assert [passage.title for passage in rows[0].negatives] == ["U"]
    assert counts.skipped["not a JSON object"] == (1 if as_array else 0)


@given(values=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=2000), max_size=3), max_size=20))
def test_json_array_is_streamed_exactly(tmp_path_factory: pytest.TempPathFactory, values: list[dict]) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(values))
    assert list(json_array(path, RowCounts())) == values


def test_broken_off_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"question": "a"}, {"question')
    with pytest.raises(UserError, match="breaks off"):
        list(json_array(path, RowCounts()))


def test_pooled(tmp_path: Path) -> None:
    passages = [{"pid": 1, "source": "s", "title": "A_B", "text": "one"}, {"pid": 2, "text": "two"}, {"pid": 3}]
    pairs = [
        {"qid": 1, "source": "s", "query": "q1", "pos": [1], "neg": [2, 9], "bm25_rank_of_pos": 4},
        {"qid": 2, "source": "s", "query": "q2", "pos": [9]},
    ]
    lines_file(tmp_path, *map(json.dumps, passages), name="passages.jsonl")
    lines_file(tmp_path, *map(json.dumps, pairs), name="pairs.jsonl")
    (row,), counts = read(tmp_path, "pooled")
    assert (row.positives[0].title, [p.text for p in row.negatives], row.bm25_rank) == ("A B", ["two"], 4)
    assert counts.skipped == {"passage without text or pid": 1, "positive not among the passages": 1}


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "copy.txt").write_text("FIRST")
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "image.png").write_bytes(b"x")
    counts = RowCounts()
    assert [(d.title, d.text) for d in read_documents(tmp_path, counts)] == [("a", "first"), ("b", "second")]
    assert counts.skipped == {"duplicate": 1, "empty": 1}
    with pytest.raises(UserError, match="no document source"):
        list(read_documents(tmp_path / "image.png", RowCounts()))


def test_compressed_books(tmp_path: Path) -> None:
    path = tmp_path / "books.jsonl.zst"
    rows = [json.dumps({"title": "T", "text": "long story"}), json.dumps({"title": "no text"})]
    path.write_bytes(zstandard.ZstdCompressor().compress("\n".join(rows).encode()))
    counts = RowCounts()
    assert [document.title for document in read_documents(path, counts)] == ["T"]
    assert counts.skipped == {"empty": 1}


class FakeHub:
    """Stands in for the package `datasets`."""

    @staticmethod
    def load_dataset(name: str, split: str, streaming: bool) -> list[dict]:
        if name != "some/pairs" or not streaming:
            raise FileNotFoundError(name)
        return [GOOD, GOOD, {"query": split, "pos": ["other"]}]


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub)
    counts = RowCounts()
    rows = list(read_hub_pairs("some/pairs", "dev", "hub", counts))
    assert [row.query for row in rows] == ["Who wrote it?", "dev"] and counts.skipped == {"duplicate": 1}
    with pytest.raises(UserError, match="Can't open data set 'no/such'"):
        list(read_hub_pairs("no/such", "train", "hub", RowCounts()))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(read_hub_pairs("some/pairs", "train", "hub", RowCounts()))
