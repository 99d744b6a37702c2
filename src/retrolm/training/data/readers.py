"""Readers of question-and-passage files; every reader is an iterator and counts the rows that it skips.

Formats (`SourceConfig.format`):
    flagembedding: JSON lines {"query", "pos": [text], "neg": [text]}, as MS MARCO is published for BGE.
    squad: {"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]} (SQuAD 1.1 and 2.0, XQuAD).
    dpr: a JSON array (or JSON lines) of {"question", "positive_ctxs", "hard_negative_ctxs", ...}.
    pooled: a folder with pairs.jsonl[.gz] (passage ids) and passages.jsonl[.gz] (texts by id).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError, unknown
from .lines import json_array, json_lines, open_bytes
from .rows import PairRow, Passage, RowCounts, checked


def read_pairs(path: Path, format_name: str, source: str, counts: RowCounts) -> Iterator[PairRow]:
    """Yield the usable rows of a file or folder in one of `PAIR_FORMATS`.

    Raises `UserError` for an unknown format, a missing file, or when no row at all is usable.
    """
    if format_name not in PAIR_FORMATS:
        raise unknown("data format", format_name, PAIR_FORMATS)
    rows = PAIR_FORMATS[format_name](path, source, counts)
    yield from checked(rows, counts, str(path))


def _flagembedding(path: Path, source: str, counts: RowCounts) -> Iterator[PairRow]:
    for number, row in enumerate(json_lines(path, counts)):
        yield flagembedding_row(row, f"{source}-{row.get('query_id', row.get('id', number))}", source)


def flagembedding_row(row: dict[str, Any], qid: str, source: str) -> PairRow:
    """Turn one {"query", "pos", "neg", "answers"?} object into a row; values of a wrong type become empty."""
    return PairRow(
        qid=qid,
        source=source,
        query=_text(row.get("query")),
        positives=_plain_passages(row.get("pos")),
        negatives=_plain_passages(row.get("neg")),
        answers=_strings(row.get("answers")),
    )


def _squad(path: Path, source: str, counts: RowCounts) -> Iterator[PairRow]:
    with open_bytes(path) as stream:
        try:
            content = json.load(stream)
        except (ValueError, EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path} is not JSON: {error}. Allowed: a SQuAD file.") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f"{path} is not in SQuAD format: it has no list 'data'.")
    for article in _objects(content["data"], counts):
        title = _text(article.get("title")).replace("_", " ")
        for paragraph in _objects(article.get("paragraphs"), counts):
            yield from _squad_paragraph(paragraph, title, source, counts)


def _squad_paragraph(paragraph: dict[str, Any], title: str, source: str, counts: RowCounts) -> Iterator[PairRow]:
    passage = Passage(_text(paragraph.get("context")), title)
    positives = (passage,) if passage.text else ()
    for question in _objects(paragraph.get("qas"), counts):
        if question.get("is_impossible"):
            counts.skip("unanswerable")
            continue
        answers = _strings([answer.get("text") for answer in _objects(question.get("answers"), counts)])
        yield PairRow(str(question.get("id")), source, _text(question.get("question")), positives, (), answers)


def _objects(values: Any, counts: RowCounts) -> Iterator[dict[str, Any]]:
    """The objects of a list; what else stands in it is counted as skipped, and what is no list has none."""
    for value in values if isinstance(values, list) else ():
        if isinstance(value, dict):
            yield value
        else:
            counts.skip("not a JSON object")


def _dpr(path: Path, source: str, counts: RowCounts) -> Iterator[PairRow]:
    with open_bytes(path) as stream:
        is_array = stream.read(64).lstrip().startswith(b"[")
    rows: Iterable[dict[str, Any]] = json_array(path, counts) if is_array else json_lines(path, counts)
    for number, row in enumerate(rows):
        yield PairRow(
            qid=f"{source}-{number}",
            source=source,
            query=_text(row.get("question")),
            positives=_titled_passages(row.get("positive_ctxs")),
            negatives=_titled_passages(row.get("hard_negative_ctxs")),
            answers=_strings(row.get("answers")),
        )


def read_passages(path: Path, counts: RowCounts) -> dict[str, tuple[str, Passage]]:
    """Read passages.jsonl[.gz] of a pooled folder: passage id -> (source, passage)."""
    found: dict[str, tuple[str, Passage]] = {}
    for row in json_lines(one_of(path, "passages.jsonl.gz", "passages.jsonl"), counts):
        text = _text(row.get("text"))
        if not text or "pid" not in row:
            counts.skip("passage without text or pid")
            continue
        title = _text(row.get("title")).replace("_", " ")
        found[str(row["pid"])] = (_text(row.get("source")), Passage(text, title))
    return found


def _pooled(path: Path, source: str, counts: RowCounts) -> Iterator[PairRow]:
    passages = read_passages(path, counts)
    for row in json_lines(one_of(path, "pairs.jsonl.gz", "pairs.jsonl"), counts):
        positives = _by_id(row.get("pos"), passages)
        if positives is None:
            counts.skip("positive not among the passages")
            continue
        rank = row.get("bm25_rank_of_pos")
        yield PairRow(
            qid=f"{source}-{row.get('qid')}",
            source=_text(row.get("source")) or source,
            query=_text(row.get("query")),
            positives=positives,
            negatives=_by_id([pid for pid in row.get("neg") or () if str(pid) in passages], passages) or (),
            answers=_strings(row.get("answers")),
            bm25_rank=rank if isinstance(rank, int) else None,
        )


def _by_id(pids: Any, passages: dict[str, tuple[str, Passage]]) -> tuple[Passage, ...] | None:
    if not isinstance(pids, list) or any(str(pid) not in passages for pid in pids):
        return None
    return tuple(passages[str(pid)][1] for pid in pids)


def one_of(folder: Path, *names: str) -> Path:
    """Return the first of these files that a folder holds; raises `UserError` if it holds none."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds none of: {', '.join(names)}.")


def _text(value: Any) -> str:
    return value.replace("\x00", " ").strip() if isinstance(value, str) else ""


def _strings(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        return ()
    return tuple(text for text in map(_text, values) if text)


def _plain_passages(values: Any) -> tuple[Passage, ...]:
    return tuple(Passage(text) for text in _strings([values] if isinstance(values, str) else values))


def _titled_passages(values: Any) -> tuple[Passage, ...]:
    contexts = [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
    passages = (Passage(_text(value.get("text")), _text(value.get("title"))) for value in contexts)
    return tuple(passage for passage in passages if passage.text)


PAIR_FORMATS: dict[str, Callable[[Path, str, RowCounts], Iterator[PairRow]]] = {
    "flagembedding": _flagembedding,
    "squad": _squad,
    "dpr": _dpr,
    "pooled": _pooled,
}
