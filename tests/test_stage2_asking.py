"""Texts that end in questions: the answers stand in the text, evaluation texts stay out, pieces hold whole turns."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from cli_runner import run_cli
from retrolm.engine.prompts import prompt_format
from retrolm.errors import UserError
from retrolm.training.data.documents import read_documents
from retrolm.training.data.rows import Document, PairRow, Passage, RowCounts
from retrolm.training.document_pieces import PieceStream, piece_cutter
from retrolm.training.stage2.asking import AskingDocuments, answered_rows, passages_document, planted_document
from stage2_run_maker import tiny_stage2_recipe
from tiny_tokenizer import STORY, tiny_tokenizer

BOOK = " ".join(f"{STORY} Chapter {n} ends here." for n in range(30))
ROWS = [
    PairRow(
        qid=str(n),
        source="s",
        query=f"What is thing {n}?",
        positives=(Passage(f"Thing {n} is a cup. " * 9),),
        negatives=(Passage(f"No {n}. " * 30),),
        answers=("a cup",),
    )
    for n in range(40)
]


@pytest.mark.parametrize("seed", range(8))
def test_planted_answers_stand_in_the_text(seed: int) -> None:
    document = planted_document("t", BOOK, random.Random(seed))
    assert len(document.turns) == max(1, len(BOOK) // 1500)
    for question, answer in document.turns:
        assert "{" not in question + answer
        assert answer.split()[-1].strip(".") in document.text and answer.split()[-1] not in BOOK
    rest = document.text
    for sentence in BOOK.split(". ")[:40]:
        assert sentence in rest
    assert (
        planted_document("t", BOOK, random.Random(seed)) == document != planted_document("t", BOOK, random.Random(99))
    )


@pytest.mark.parametrize("chars", [300, 3000, 9000])
def test_passages_hold_the_evidence_of_each_question(chars: int) -> None:
    document = passages_document(ROWS, chars, random.Random(0))
    assert len(document.turns) == max(1, chars // 1500)
    for question, answer in document.turns:
        (row,) = [row for row in ROWS if row.query in question]
        assert row.positives[0].text in document.text and answer == "a cup"
    assert chars / 2 < len(document.text) < 1.2 * chars + 200


def test_they_are_spread_over_the_documents() -> None:
    asking = AskingDocuments(5, 3, ROWS, 2000)
    counts = [len(list(asking.after(Document("", BOOK), number, 4))) for number in range(4)]
    assert counts == [1, 2, 2, 3]
    assert list(asking.after(Document("", BOOK), 1, 4)) == list(asking.after(Document("", BOOK), 1, 4))


def write_pool(folder: Path) -> Path:
    """Five questions: usable, of a dropped source, asked in evaluation, on its passage, with a long answer."""
    folder.mkdir()
    passages = [f"{name} " + " ".join(f"{name}{n}" for n in range(40)) for name in "abcde"]
    rows = [{"pid": str(n), "source": "s", "text": text} for n, text in enumerate(passages)]
    pairs = [
        {"qid": n, "source": "bad" if n == 1 else "s", "query": f"Question {n}?", "pos": [str(n)], "neg": ["3", "0"],
         "answers": ["x" * 200 if n == 4 else f"a{n}"], "bm25_rank_of_pos": 1}
        for n in range(5)
    ]  # fmt: skip
    for name, found in (("passages.jsonl", rows), ("pairs.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "evaluation.jsonl").write_text(json.dumps(["question 2?", passages[3]]) + "\n")
    return folder


def test_evaluation_texts_stay_out(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool")
    found = answered_rows(pool, ["bad"], [pool / "evaluation.jsonl"])
    assert [row.query for row in found] == ["Question 0?"]
    assert [passage.text[0] for passage in found[0].negatives] == ["a"]
    assert len(answered_rows(pool, [], [])) == 4
    with pytest.raises(UserError, match="no question with a short answer"):
        answered_rows(pool, ["bad", "s"], [])


def test_the_command_writes_them_and_training_reads_them(tmp_path: Path) -> None:
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": f"Book {n}. {BOOK}"}) + "\n" for n in range(6)))
    pool = write_pool(tmp_path / "pool")
    words = ["data", "stage2", tmp_path / "books.jsonl", "--held-out", 2, "--excerpt-chars", 2000, "--json"]
    words += ["--planted", 4, "--asking-chars", 2000]
    refused = run_cli(*words, "--passages", 2, "--out", tmp_path / "x")
    refused.refused_in_one_line("--passages and --pairs belong together")
    words += ["--passages", 2, "--pairs", pool, "--drop", "bad"]
    found = run_cli(*words, "--out", tmp_path / "one").json
    run_cli(*words, "--out", tmp_path / "two")
    bytes_of = [(tmp_path / name / "train.jsonl.gz").read_bytes() for name in ("one", "two")]
    assert bytes_of[0] == bytes_of[1]
    assert found["train.jsonl.gz"]["documents"] == 10 and found["held_out.jsonl.gz"]["turns"] == 0
    rows = [json.loads(line) for line in gzip.decompress(bytes_of[0]).splitlines()]
    assert sum("turns" in row for row in rows) == 6 and rows[0].keys() == {"title", "text"}
    read = list(read_documents(tmp_path / "one" / "train.jsonl.gz", RowCounts()))
    assert sum(bool(document.turns) for document in read) == 6


@pytest.mark.parametrize("prefix", ["chat", ""])
def test_pieces_end_with_whole_turns(prefix: str, tmp_path: Path) -> None:
    """In the very ids in which a document is asked; one that doesn't fit is left out."""
    tokenizer = tiny_tokenizer()
    form = prompt_format(tokenizer, chat=prefix == "chat")
    turns = (("\nWhat is late?", "the bus"), ("\nWho waits?", "we"))
    (piece,) = piece_cutter(tiny_stage2_recipe({"prefix": prefix}).data, tokenizer)(Document("", STORY[:300], turns))
    asked = [*form.prefix_ids, *form.encode(STORY[:300]), *form.question_ids(turns[0][0])]
    assert piece.tolist()[: len(asked)] == asked
    text = tokenizer.decode(piece)
    assert text.endswith(form.between + "\nWho waits?" + form.tail + ("we" if prefix else " we"))
    assert piece_cutter(tiny_stage2_recipe({"max_tokens": 60}).data, tokenizer)(Document("", STORY[:300], turns)) == []


def test_turns_that_are_none_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": STORY * 2, "turns": [["q", "a"], ["q"], 3, ["q", 4]]}, {"text": "b " + STORY, "turns": "no"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [document.turns for document in read_documents(tmp_path / "a.jsonl", RowCounts())] == [(("q", "a"),), ()]
    data = tiny_stage2_recipe({"path": "a.jsonl", "dev_path": "", "epochs": 1, "max_tokens": 900}).data
    assert len(list(PieceStream(data, tiny_tokenizer(), tmp_path))) == 2
