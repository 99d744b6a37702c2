"""Long-document questions: packing to a length, evidence spans, formats of the sources."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from retrolm.errors import UserError
from retrolm.evaluation.tasks import get_task, list_tasks
from retrolm.evaluation.tasks.qa_files import read_multihop, read_squad
from retrolm.evaluation.tasks.sample import EvalSample
from tiny_tokenizer import STORY, tiny_tokenizer

NAMES = [name.removeprefix("longdoc/") for name in list_tasks() if name.startswith("longdoc/")]
PACKED = [name for name in NAMES if name != "qmsum"]
HOPS = ("hotpotqa", "2wikimqa", "musique")


def _article(number: int, parts: int, words: int) -> dict[str, Any]:
    texts = [f"Report {number}.{part}: owner {number}{part} rules. " + "Rain fell. " * words for part in range(parts)]
    paragraphs = []
    for text in texts:
        start = text.index("owner")
        answers = [{"text": text[start : start + 8].strip(), "answer_start": start + 3}]  # off by three, as some are
        gone = [{"text": "not in the text", "answer_start": 0}]
        questions = [{"question": f"Who rules {text[:10]}?", "answers": answers, "id": text[:10]}]
        paragraphs.append({"context": text, "qas": [*questions, {"question": "Gone?", "answers": gone}]})
    return {"title": str(number), "paragraphs": paragraphs}


def _hop_row(number: int) -> dict[str, Any]:
    parts = [
        {
            "title": f"Place {number}.{part}",
            "text": f"It is near {number}. {STORY[:80]}",
            "is_supporting": part % 3 == 0,
        }
        for part in range(6)
    ]
    return {"_id": f"q{number}", "question": f"Where is {number}?", "answers": [f"near {number}"], "paragraphs": parts}


def _meeting(number: int, turns: int) -> dict[str, Any]:
    query = {"query": "What about turn 3?", "answer": "It went well. ", "relevant_text_span": [["3", "4"], ["6", "6"]]}
    transcript = [{"speaker": "Grad", "content": f"Turn {turn} of {number}."} for turn in range(turns)]
    return {"specific_query_list": [query, query], "general_query_list": [], "meeting_transcripts": transcript}


def _marco_row(number: int) -> dict[str, Any]:
    passages = [{"text": f"Passage {number}.{part} on rain.", "relevance": float(part == 4)} for part in range(6)]
    return {"query_id": str(number), "query": f"rain {number}?", "passages": passages[: 4 if number == 0 else 6]}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    files: dict[str, Any] = {
        "COVID-QA.json": {"data": [_article(number, 1, 60) for number in range(8)]},
        "xquad.en.json": {"data": [_article(number, 3, 10) for number in range(12)]},
        "multihop/2wiki_corpus.json": [{"title": f"Town {number}", "text": STORY} for number in range(9)],
        "qmsum/test.jsonl": [_meeting(0, 9), _meeting(1, 300)],
        "msmarco/dev.jsonl": [_marco_row(number) for number in range(20)],
    }
    rows = [_hop_row(number) for number in range(12)]
    files |= {"multihop/hotpot_dev200.json": rows, "multihop/2wiki_dev164.json": rows}
    files["multihop/musique_dev200.jsonl"] = rows
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        lines = content if name.endswith("jsonl") else [content]
        path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return folder


def _samples(name: str, data_dir: Path, length: int | None = 1500, count: int | None = 5) -> list[EvalSample]:
    return get_task(f"longdoc/{name}").samples(tiny_tokenizer(), length, count, data_dir=data_dir)


@pytest.mark.parametrize("length", [None, 1500])
@pytest.mark.parametrize("name", NAMES)
def test_evidence_spans_hold_the_answer(name: str, length: int | None, data_dir: Path) -> None:
    for sample in _samples(name, data_dir, length):
        pieces = [sample.context[start:end] for start, end in sample.gold_spans]
        assert pieces
        if name == "qmsum":
            assert [re.findall(r"Turn (\d+)", piece) for piece in pieces] == [["3", "4"], ["6"]]
        elif name == "msmarco":
            label = sample.context[: sample.gold_spans[0][0]].split("\n")[-1]
            assert sample.answers == [label.removesuffix(": ")]
            assert re.fullmatch(r"Passage \d+\.4 on rain\.", pieces[0])
        else:
            assert all(sample.answers[0] in piece for piece in pieces)
        assert get_task(sample.task).score(sample.answers[0], sample) == pytest.approx(1.0)


@pytest.mark.parametrize("name", PACKED)
def test_packed_samples_fill_the_length(name: str, data_dir: Path) -> None:
    samples = _samples(name, data_dir)
    assert len(samples) == 5
    for sample in samples:
        used = sample.extra["num_tokens"] + sample.max_new_tokens
        assert (1460 if name == "covidqa" else 1300) < used <= 1500  # a cut paper fills better than whole passages


@pytest.mark.parametrize("name", PACKED)
def test_natural_samples_hold_their_own_texts_only(name: str, data_dir: Path) -> None:
    own = {"covidqa": 1, "xquad": 3, "msmarco": 6}.get(name, 6)
    marks = {"covidqa": r"Report", "xquad": r"Passage \d+:\n", "msmarco": r"Paragraph \d+: "}.get(
        name, r"Passage \d+:\n"
    )
    for sample in _samples(name, data_dir, None, None):
        assert len(re.findall(marks, sample.context)) == own


@pytest.mark.parametrize("name", HOPS)
def test_filler_never_shares_a_title_with_the_questions_texts(name: str, data_dir: Path) -> None:
    for sample in _samples(name, data_dir):
        titles = re.findall(r"^Passage \d+:\n(.*)$", sample.context, re.MULTILINE)
        assert len(titles) == len(set(titles)) > 6
        assert {f"Place {sample.sample_id[1:]}.{part}" for part in range(6)} <= set(titles)


def test_questions_without_a_findable_answer_are_left_out(data_dir: Path) -> None:
    assert len(_samples("xquad", data_dir, None, None)) == 36
    assert len(_samples("covidqa", data_dir, None, None)) == 8
    assert len(_samples("msmarco", data_dir, None, None)) == 19  # one query has no relevant passage


def test_a_length_leaves_out_what_can_not_fit(data_dir: Path) -> None:
    every, short = _samples("qmsum", data_dir, None, None), _samples("qmsum", data_dir, 1200, None)
    assert (len(every), len(short)) == (4, 2)
    assert {sample.sample_id for sample in short} == {"test-0-0", "test-0-1"}
    assert {sample.sample_id for sample in short} < {sample.sample_id for sample in every}
    with pytest.raises(UserError, match="at least"):
        _samples("covidqa", data_dir, 300)


def test_too_little_text_for_the_length_is_an_error(data_dir: Path) -> None:
    with pytest.raises(UserError, match="at hand fill"):
        _samples("msmarco", data_dir, 60_000)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_choose_and_repeat(name: str, data_dir: Path) -> None:
    task = get_task(f"longdoc/{name}")
    first = task.samples(tiny_tokenizer(), 1500, 2, seed=1, data_dir=data_dir)
    assert first == task.samples(tiny_tokenizer(), 1500, 2, seed=1, data_dir=data_dir)
    assert first == task.samples(tiny_tokenizer(), 1500, 3, seed=1, data_dir=data_dir)[:2]
    ids = {
        seed: task.samples(tiny_tokenizer(), 1500, 2, seed=seed, data_dir=data_dir)[0].sample_id for seed in range(9)
    }
    assert len(set(ids.values())) > 1


def test_missing_sets_are_named(tmp_path: Path) -> None:
    for name in NAMES:
        with pytest.raises(UserError, match="Looked for"):
            _samples(name, tmp_path)
    with pytest.raises(UserError, match="not on the hub"):
        _samples("qmsum", Path("hub"))


def test_meeting_split_is_checked(data_dir: Path) -> None:
    assert get_task("longdoc/qmsum", split="val").name == "longdoc/qmsum"
    with pytest.raises(UserError, match="Allowed: test, train, val"):
        get_task("longdoc/qmsum", split="dev")


def test_multihop_formats_read_alike(tmp_path: Path) -> None:
    ours = {"_id": "1", "question": "Q", "answers": ["a"], "paragraphs": []}
    ours["paragraphs"] = [
        {"title": "T", "text": "x y", "is_supporting": True},
        {"title": "U", "text": "z", "is_supporting": False},
    ]
    hotpot = {"_id": "1", "question": "Q", "answer": "a", "context": [["T", ["x", " y"]], ["U", ["z"]]]}
    hotpot["supporting_facts"] = [["T", 0]]
    musique = {"id": "1", "question": "Q", "answer": "a", "answer_aliases": [], "paragraphs": []}
    musique["paragraphs"] = [{**part, "paragraph_text": part["text"]} for part in ours["paragraphs"]]
    for part in musique["paragraphs"]:
        del part["text"]
    for name, row in {"ours": ours, "hotpot": hotpot, "musique": musique}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    read = [read_multihop(tmp_path / f"{name}.json") for name in ("ours", "hotpot", "musique")]
    assert read[0] == read[1] == read[2]
    (tmp_path / "bad.json").write_text('[{"question": "Q"}]')
    with pytest.raises(UserError, match="multi-hop"):
        read_multihop(tmp_path / "bad.json")


def test_squad_rows_and_articles_read_alike(tmp_path: Path) -> None:
    article = _article(0, 1, 5)
    (tmp_path / "a.json").write_text(json.dumps({"data": [article]}))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(article["paragraphs"][0]))
    nested, rows = read_squad(tmp_path / "a.json"), read_squad(tmp_path / "a.jsonl.gz")
    assert nested == rows
    found, gone = nested[0].questions
    assert found.start == nested[0].text.index("owner") and gone.start is None
    for text in ('{"rows": []}', '[{"title": "x"}]'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="SQuAD format"):
            read_squad(tmp_path / "bad.json")
