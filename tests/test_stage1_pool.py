"""The prepared pool: what it holds, what it leaves out, and that it is refused when damaged or foreign."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.training.data import TokenPool, prepare_pool
from retrolm.training.data.collect import is_held_out
from retrolm.training.data.encoder import tokenizer_fingerprint
from retrolm.training.data.pool import compact_ids
from retrolm.training.data.rows import content_hash
from retrolm.training.data.sentences import sentence_starts, split_sentences, token_span, token_starts
from stage1_pool_maker import WEIGHTS, passage_text, tiny_config, tiny_pool, write_corpus
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def pool() -> TokenPool:
    return TokenPool(tiny_pool(), tiny_tokenizer())


def text(ids: np.ndarray[Any, Any]) -> str:
    return str(tiny_tokenizer().decode(ids.tolist()))


def test_passages_and_titles_survive(pool: TokenPool) -> None:
    texts = {passage_text(n) for n in range(120)}
    assert {text(pool.passage(i)) for i in range(pool.num_passages)} <= texts
    titles = {text(pool.title(i)) for i in range(pool.num_passages)}
    assert "Village 1\n" in titles and "" in titles


def test_evaluation_texts_are_left_out(pool: TokenPool) -> None:
    held = {text(pool.passage(i)) for i in range(pool.num_passages)}
    assert passage_text(3) not in held and passage_text(4) in held
    assert pool.manifest["rows"]["pairs"]["skipped"]["passage of an evaluation set"] == 1


def test_answers_are_located(pool: TokenPool) -> None:
    row = pool.row(int(pool.rows_of("wiki", "train")[0]))
    passage = pool.passage(int(row.positives[0]))
    start, end = row.answers[0]
    founder = text(passage).split("founded by ")[1].split(" in ")[0]
    assert text(passage[start:end]).strip() == founder


def test_quoted_sentences_are_located(pool: TokenPool) -> None:
    rows = [pool.row(int(i)) for i in pool.rows_of("sentences", "train")]
    cut = [row for row in rows if row.cut[0] >= 0]
    assert cut
    for row in cut:
        start, end = row.cut
        assert text(pool.passage(int(row.positives[0]))[start:end]).strip() == row.query


def test_dev_passages_are_no_train_positives(pool: TokenPool) -> None:
    splits = pool.arrays["row_split"]
    positives: dict[int, set[int]] = {0: set(), 1: set()}
    questions: dict[int, set[str]] = {0: set(), 1: set()}
    for index in range(len(pool.queries)):
        row = pool.row(index)
        positives[int(splits[index])] |= {int(i) for i in row.positives}
        questions[int(splits[index])].add(row.query)
    assert positives[1] and not positives[0] & positives[1]
    natural = {pool.queries[i] for source in ("wiki", "chat") for i in pool.rows_of(source, "dev")}
    assert natural and not natural & questions[0]
    assert all(not is_held_out(content_hash(text(pool.passage(i))), 0.15) for i in positives[0])


def test_missing_negatives_are_mined(pool: TokenPool) -> None:
    for source in ("wiki", "chat", "keywords", "cloze"):
        for index in pool.rows_of(source, "train"):
            row = pool.row(int(index))
            assert len(row.negatives) and not set(row.negatives.tolist()) & set(row.positives.tolist())


def test_token_arrays_are_16_bit_and_small(pool: TokenPool) -> None:
    assert pool.arrays["passages"].dtype == np.uint16
    assert sum(entry["bytes"] for entry in pool.manifest["files"].values()) < 2_000_000


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path, pool: TokenPool) -> None:
    write_corpus(tmp_path)
    manifest = prepare_pool(tiny_config(), tiny_tokenizer(), tmp_path / "pool", tmp_path)
    assert manifest["files"] == pool.manifest["files"]


def test_the_same_question_never_gets_its_other_answers_as_negatives(tmp_path: Path) -> None:
    texts = [f"Ada keeps bees near pond {n}." for n in range(6)]
    rows = [{"query": "where does ADA keep bees", "pos": [texts[0]], "neg": [texts[1], texts[2]]}]
    rows += [{"query": "Where does Ada keep bees", "pos": [texts[1]]}, {"query": "pond", "pos": texts[3:]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = {"name": "bees", "path": "rows.jsonl", "format": "flagembedding"}
    config = tiny_config(sources=[source], weights={"bees": 1}, exclude=[], dev_fraction=0.0)
    prepare_pool(config, tiny_tokenizer(), tmp_path / "pool", tmp_path)
    pool = TokenPool(tmp_path / "pool")
    negatives = [{text(pool.passage(int(i))) for i in pool.row(row).negatives} for row in (0, 1)]
    assert negatives[0] == {texts[2]} and negatives[1] and not {texts[0], texts[1]} & negatives[1]


def test_negatives_can_come_from_an_embedder(tmp_path: Path) -> None:
    write_corpus(tmp_path)

    def embed(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        return np.ones((len(texts), 1), dtype=np.float32)  # all tie, so the first passages are taken

    config = tiny_config(weights={"wiki": 1}, mined_negatives=3)
    prepare_pool(config, tiny_tokenizer(), tmp_path / "pool", tmp_path, embed=embed)
    pool = TokenPool(tmp_path / "pool")
    mined = [pool.row(i).negatives.tolist() for i in range(len(pool.queries)) if max(pool.row(i).negatives) < 6]
    assert [0, 1, 2] in mined


def test_the_size_limit_cuts_books(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    limit = 700_000
    manifest = prepare_pool(tiny_config(max_pool_bytes=limit), tiny_tokenizer(), tmp_path / "pool", tmp_path)
    written = sum(path.stat().st_size for path in (tmp_path / "pool").iterdir())
    assert 0 < manifest["num_book_tokens"] < TokenPool(tiny_pool()).manifest["num_book_tokens"]
    assert written <= limit


def test_weak_and_dropped_sources(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    source = {"name": "pairs", "path": "pairs", "format": "pooled", "drop": ["chat"], "max_bm25_rank": {"wiki": 10}}
    config = tiny_config(sources=[source], weights={"wiki": 1}, exclude=[])
    manifest = prepare_pool(config, tiny_tokenizer(), tmp_path / "pool", tmp_path)
    skipped = manifest["rows"]["pairs"]["skipped"]
    assert skipped["dropped source chat"] == 55 and skipped["positive not found by BM25"] > 10
    assert set(manifest["num_questions"]["train"]) == {"wiki"}


def test_an_exclude_pattern_without_files_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    with pytest.raises(UserError, match="No file matches 'gone/"):
        prepare_pool(tiny_config(exclude=["gone/*.json"]), tiny_tokenizer(), tmp_path / "pool", tmp_path)
    assert not (tmp_path / "pool").exists()


def test_a_weight_of_nothing_there_is_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = tiny_config(weights={**WEIGHTS, "register": 1.0})
    with pytest.raises(UserError, match=r"mixture in \[data.weights\] 'register'. Did you mean 'registers'"):
        prepare_pool(config, tiny_tokenizer(), tmp_path / "pool", tmp_path)
    assert not (tmp_path / "pool").exists()


def test_a_damaged_pool_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny_pool(), tmp_path / "pool")
    array = tmp_path / "pool" / "passages.npy"
    array.write_bytes(array.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match=r"passages\.npy is missing or damaged"):
        TokenPool(tmp_path / "pool")
    (tmp_path / "pool" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no prepared pool"):
        TokenPool(tmp_path / "pool")


def test_a_foreign_tokenizer_or_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another tokenizer"):
        TokenPool(tiny_pool(), tiny_tokenizer(chat=False))
    shutil.copytree(tiny_pool(), tmp_path / "pool")
    path = tmp_path / "pool" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        TokenPool(tmp_path / "pool")


@given(ids=st.lists(st.integers(0, 200_000), min_size=1, max_size=200))
def test_compact_ids_are_reversible(ids: list[int]) -> None:
    compact = compact_ids({"a": np.array(ids, np.uint32), "b": np.array([7], np.uint32)})
    assert compact["vocab"][compact["a"]].tolist() == ids and compact["a"].dtype == np.uint16


def test_sentences() -> None:
    story = 'It rained. "Did it?" asked Dr. Gray. Yes! In 1901 J. Hale saw it.\n\nthe end'
    assert split_sentences(story) == [
        "It rained.",
        '"Did it?" asked Dr. Gray.',
        "Yes!",
        "In 1901 J. Hale saw it.",
        "the end",
    ]


@given(words=st.lists(st.sampled_from(["Ada went.", "no end", "Why?", "9 lives", "(Maybe.)"]), min_size=1, max_size=30))
def test_sentence_tokens_cover_their_characters(words: list[str]) -> None:
    story = " ".join(words)
    spans = [(i, i + 1) for i in range(len(story))]  # one token per character
    starts = sentence_starts(story)
    assert token_starts(starts, spans) == starts
    for start in starts:
        assert token_span(start, start + 3, spans) == (start, min(start + 3, len(story)))


def test_a_call_that_cuts_or_pads_leaves_the_tokenizer_the_same() -> None:
    """Such options stay with a fast tokenizer; a pool is for all who split texts alike."""
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template = "other"
    assert tokenizer_fingerprint(tokenizer) != before
