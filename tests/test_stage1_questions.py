"""Questions made from passages by rule, hard negatives, and evaluation texts kept out."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.planting import random_facts, words
from retrolm.training.data.chains import draw_chains
from retrolm.training.data.config import PASSAGE_QUERY_KINDS
from retrolm.training.data.fact_wordings import draw_line_wording, draw_wording
from retrolm.training.data.mining import BM25Miner, EmbeddingMiner
from retrolm.training.data.overlap import EvaluationTexts, file_texts
from retrolm.training.data.passage_queries import cloze_question, common_words, keyword_question, passage_query
from retrolm.training.data.question_rules import rule_questions, subject_of
from retrolm.training.data.quizzes import draw_quiz, quiz_on, together, with_decoys
from retrolm.training.data.rows import Passage

COMMON = frozenset(words("the of in was by and a is to it for that from on at an"))
TOWER = (
    "The Brandt Tower is a lighthouse located in Tromso that was designed by Sabine Kessler in 1911. "
    "Its granite staircase counts 274 steps and leads to a copper lantern made in Bergen. "
    "Every summer divers search the wreck of the steamer Halvard below the cliff."
)


def test_rules_ask_about_the_subject() -> None:
    questions = rule_questions(TOWER, "")
    assert {"where is The Brandt Tower", "who designed The Brandt Tower", "what is The Brandt Tower"} <= set(questions)
    assert rule_questions("It was late. He left the house.", "") == []


def test_the_title_is_the_subject_if_the_text_names_it() -> None:
    assert subject_of("Ada Abbott (born 1901) was a pilot.", "Ada Abbott (pilot)") == "Ada Abbott"
    assert subject_of("The town lies near Riga and is old.", "Unrelated") == "The town lies near Riga and"
    assert subject_of("This is it.", "") is None


@given(seed=st.integers(0, 300))
def test_cloze_asks_for_something_of_the_sentence(seed: int) -> None:
    sentence = TOWER.split(". ")[1] + "."
    question = cloze_question(sentence, COMMON, random.Random(seed))
    assert question is not None
    assert question != sentence and (question.endswith("?") or "____" in question)
    missing = [w for w in sentence.rstrip(".").split() if w.lower() not in question.lower()]
    assert missing  # at least the word asked for is gone


def test_cloze_needs_three_uncommon_words() -> None:
    assert cloze_question("It was in the house of the king.", COMMON | {"king", "house"}, random.Random(0)) is None


@given(kind=st.sampled_from(PASSAGE_QUERY_KINDS), seed=st.integers(0, 200))
def test_made_questions_come_from_the_passage(kind: str, seed: int) -> None:
    made = passage_query(kind, Passage(TOWER, "Brandt Tower"), COMMON, random.Random(seed))
    assert made is not None and made.kind == kind and made.query
    if made.cut:
        assert TOWER[slice(*made.cut)] == made.query
    if kind == "keywords":
        assert all(word in TOWER for word in made.query.split(", "))
        assert keyword_question(made.query, random.Random(seed)).lower().count(made.query.split(", ")[0].lower())


def test_a_passage_without_substance_yields_nothing() -> None:
    assert all(
        passage_query(kind, Passage("It was."), COMMON, random.Random(0)) is None for kind in PASSAGE_QUERY_KINDS
    )


def test_common_words_are_the_frequent_tenth() -> None:
    texts = [f"the word{n} and name{n} of thing{n} kind{n} sort{n} form{n} type{n}" for n in range(20)]
    assert {"the", "and", "of"} <= common_words(texts)
    assert len(common_words(texts, count=2)) == 2


@given(seed=st.integers(0, 400), keys=st.integers(1, 16))
def test_quizzes_ask_for_what_they_state(seed: int, keys: int) -> None:
    rng = random.Random(seed)
    quiz = draw_quiz(rng, draw_line_wording(rng) if seed % 3 == 0 else draw_wording(rng), keys)
    assert len(quiz.statements) == len(quiz.is_evidence) >= keys and any(quiz.is_evidence)
    assert "{" not in "".join([quiz.question, quiz.answer_prefix]) and not any("{key}" in s for s in quiz.statements)
    assert len(set(quiz.statements)) == len(quiz.statements)


@given(seed=st.integers(0, 400))
def test_decoys_are_about_the_asked_key_and_no_evidence(seed: int) -> None:
    rng = random.Random(seed)
    wording = draw_wording(rng)
    plain = quiz_on(rng, wording, random_facts(rng, 3, wording.key_kinds[0], wording.value_kinds[0]))
    decoyed = with_decoys(rng, plain, wording)
    added = [text for text in decoyed.statements if text not in plain.statements]
    assert all(any(key in text for key in plain.asked) for text in added)
    evidence = [text for text, wanted in zip(decoyed.statements, decoyed.is_evidence, strict=True) if wanted]
    assert evidence == [text for text, wanted in zip(plain.statements, plain.is_evidence, strict=True) if wanted]


@given(seed=st.integers(0, 400), count=st.integers(1, 6), most=st.integers(1, 20))
def test_facts_of_several_kinds_are_asked_for_one_by_one(seed: int, count: int, most: int) -> None:
    rng = random.Random(seed)
    quizzes = [draw_quiz(rng, draw_wording(rng), rng.randint(1, 5), most) for _ in range(count)]
    found = together(rng, quizzes, most)
    assert sorted(found.statements) == sorted(text for quiz in quizzes for text in quiz.statements)
    assert (found.question, found.answer_prefix) == (quizzes[0].question, quizzes[0].answer_prefix)
    expected = []
    for number, quiz in enumerate(quizzes):
        rows = list(zip(quiz.statements, quiz.is_evidence, quiz.answers, strict=True))
        own = {text for text, wanted, _ in rows if wanted}
        if number:
            expected.append(((quiz.question, quiz.answer_prefix), own))
        else:
            assert {t for t, wanted in zip(found.statements, found.is_evidence, strict=True) if wanted} == own
        expected += [(asked, {text for text, _, a in rows if a == n}) for n, asked in enumerate(quiz.further)]
    asked_for = [
        (asked, {text for text, a in zip(found.statements, found.answers, strict=True) if a == n})
        for n, asked in enumerate(found.further)
    ]
    assert asked_for == expected[:most]
    assert max(found.answers) < len(found.further)


@given(seed=st.integers(0, 400), count=st.integers(1, 7))
def test_chains_lead_from_the_question_to_the_end(seed: int, count: int) -> None:
    chains = draw_chains(random.Random(seed), count)
    assert len(chains) == count and all(2 <= len(chain.statements) <= 4 for chain in chains)
    statements = [text for chain in chains for text in chain.statements]
    assert len(set(statements)) == len(statements)
    for chain in chains:
        for first, second in zip(chain.statements, chain.statements[1:], strict=False):
            assert {w.strip(".,:'s") for w in first.split()} & {w.strip(".,:'s") for w in second.split()}


def test_mining_skips_positives_and_answers() -> None:
    texts = ["green apples from Kent", "red apples from Kent", "apples hold the answer Calville", "no fruit at all"]
    miner = BM25Miner(texts)
    assert miner.mine(["green apples from Kent"], [{0}], [["Calville"]], 3) == [[1]]
    assert set(miner.mine(["apples"], [set()], [["red"]], 9)[0]) == {0, 1, 2}  # answers of 3 letters don't count
    with pytest.raises(UserError, match="no passages"):
        BM25Miner([])


def test_mining_with_embeddings() -> None:
    texts = ["red kite", "red car", "blue kite", "green boat"]
    letters = sorted({word for text in texts for word in text.split()})

    def embed(batch: Sequence[str]) -> np.ndarray[Any, Any]:
        return np.array([[word in text.split() for word in letters] for text in batch], dtype=np.float32)

    assert EmbeddingMiner(texts, embed).mine(["red kite", "boat"], [{0}, set()], [[], ["green"]], 2) == [[1, 2], [0, 1]]


def test_evaluation_texts(tmp_path: Path) -> None:
    long = " ".join(f"word{n}" for n in range(40))
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"question": "Who is it?", "text": long}]}))
    (tmp_path / "b.txt").write_text("plain " * 50)
    held = EvaluationTexts([*file_texts(tmp_path / "a.json"), *file_texts(tmp_path / "b.txt")])
    assert held.has_question("who  is IT?") and not held.has_question("Who is she?")
    assert held.shares_passage("x " + " ".join(f"Word{n}," for n in range(5, 18)))
    assert not held.shares_passage(" ".join(f"word{n}" for n in range(5, 17)))
