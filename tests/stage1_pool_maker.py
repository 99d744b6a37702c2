"""A small corpus on disk and a pool prepared from it, for tests of the stage-1 data."""

from __future__ import annotations

import gzip
import json
import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from retrolm.planting import NOUNS, city, invented_word, person
from retrolm.training.data import Stage1DataConfig, prepare_pool, stage1_data_config
from tiny_tokenizer import tiny_tokenizer

WEIGHTS = {
    "wiki": 3,
    "chat": 2,
    "rule_questions": 1,
    "keywords": 1,
    "cloze": 1,
    "sentences": 1,
    "quoted": 1,
    "facts": 2,
    "registers": 1,
    "chains": 1,
    "transcripts": 1,
    "composed": 1,
}


def passage_text(number: int) -> str:
    """A passage of its own about an invented place; the same for the same number."""
    rng = random.Random(number)
    name, things = invented_word(rng), rng.sample(NOUNS, 3)
    return (
        f"{name} is a village near {city(rng)} that was founded by {person(rng)} in {rng.randint(1200, 1950)}. "
        f"It is known for its {things[0]} market and the {invented_word(rng)} {things[1]} museum. "
        f"Every autumn the people of {name} carry a {things[2]} to the {invented_word(rng)} bridge. "
        f"The mayor, {person(rng)}, opened the {invented_word(rng)} library with {rng.randint(100, 9999)} books."
    )


def book_text(number: int, sentences: int = 400) -> str:
    """Prose of many different sentences."""
    rng = random.Random(f"book {number}")
    return " ".join(
        f"{person(rng)} walked from {city(rng)} to {city(rng)} with a {rng.choice(NOUNS)} and thought of "
        f"{invented_word(rng)} and the {rng.choice(NOUNS)}."
        for _ in range(sentences)
    )


def write_corpus(root: Path, num_passages: int = 120) -> None:
    """Write a pooled folder (sources wiki and chat), a folder of documents and one evaluation file."""
    folder = root / "pairs"
    folder.mkdir(parents=True)
    sources = ["wiki" if n % 2 else "chat" for n in range(num_passages)]
    passages = [
        {"pid": f"p{n}", "source": sources[n], "title": f"Village_{n}" if n % 3 else "", "text": passage_text(n)}
        for n in range(num_passages)
    ]
    pairs = [
        {
            "qid": n,
            "source": sources[n],
            "query": f"Who founded {passage_text(n).split()[0]} (question {n})?",
            "pos": [f"p{n}"] if n % 10 else [f"p{n}", f"p{n + 1}"],
            "neg": [f"p{(n + k) % num_passages}" for k in (5, 6, 7)] if n % 4 else [],
            "answers": [" ".join(passage_text(n).split("founded by ")[1].split()[:2])],
            "bm25_rank_of_pos": n % 30 or None,
        }
        for n in range(num_passages - 10)
    ]
    _write_lines(folder / "passages.jsonl.gz", passages)
    _write_lines(folder / "pairs.jsonl.gz", pairs)
    books = root / "library"
    books.mkdir()
    for number in range(6):
        (books / f"book{number}.txt").write_text(book_text(number))
    _write_lines(root / "evaluation.jsonl.gz", [{"question": "Who?", "text": passage_text(3)}])


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def tiny_config(**changes: Any) -> Stage1DataConfig:
    """Settings for the tiny corpus; keyword arguments replace single ones."""
    table: dict[str, Any] = {
        "seed": 5,
        "min_tokens": 1024,
        "max_tokens": 2048,
        "length_group": 4,
        "max_passage_tokens": 300,
        "dev_fraction": 0.15,
        "weights": WEIGHTS,
        "exclude": ["evaluation.jsonl.gz"],
        "sources": [
            {"name": "pairs", "path": "pairs", "format": "pooled", "licence": "test"},
            {"name": "library", "path": "library", "format": "documents"},
        ],
    }
    return stage1_data_config({**table, **changes})


@cache
def tiny_pool() -> Path:
    """Prepare the pool once per test run and return its folder."""
    root = Path(mkdtemp(prefix="retrolm-stage1-"))
    write_corpus(root)
    prepare_pool(tiny_config(), tiny_tokenizer(), root / "pool", root)
    return root / "pool"
