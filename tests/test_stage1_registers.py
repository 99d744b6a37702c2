"""Registers: every page looks like the one asked for, and the labels point at the statements of the asked keys."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.training.data import Stage1Dataset, Stage1Sample, page_labels
from retrolm.training.data.encoder import TextEncoder
from retrolm.training.data.fact_wordings import FORMS, draw_line_wording, draw_question, draw_wording
from retrolm.training.data.keys import KINDS, PLENTIFUL_KINDS, draw_facts, draw_strings, look_alike, maker
from retrolm.training.data.mixture import text_length
from retrolm.training.data.quizzes import draw_quiz, in_turn, quiz_on
from stage1_pool_maker import WEIGHTS, tiny_config, tiny_pool
from tiny_tokenizer import tiny_tokenizer

PAGE = 128


def registers(**changes: Any) -> Stage1Dataset:
    weights = {**dict.fromkeys(WEIGHTS, 0.0), "registers": 1.0}
    config = tiny_config(
        **{"weights": weights, "min_tokens": 2000, "max_tokens": 4000, "further_questions": 6, **changes}
    )
    return Stage1Dataset(tiny_pool(), tiny_tokenizer(), config, 1000)


def decoded(ids: np.ndarray[Any, Any]) -> str:
    return str(tiny_tokenizer().decode(ids.tolist()))


def has(text: str, key: str) -> bool:
    """Whether a text names a key, and not only a longer one that holds it."""
    return re.search(rf"(?<![\w.-]){re.escape(key)}(?![\w-])", text) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_distinct_and_reproducible(kind: str) -> None:
    def drawn(seed: int) -> list[str]:
        rng = random.Random(seed)
        return draw_strings(rng, maker(rng, kind), 40, taken=("x",), alike=0.0 if kind not in PLENTIFUL_KINDS else 0.5)

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 40 and all(text.strip() == text != "" for text in drawn(1))


@pytest.mark.parametrize("kind", ["number", "uuid", "hex", "plate", "word_pair", "person", "term", "code", "hash"])
def test_look_alikes_differ_in_one_place(kind: str) -> None:
    rng = random.Random(3)
    make = maker(rng, kind)
    for _ in range(60):
        text, other = make(rng), make(rng)
        alike = look_alike(rng, text, other)
        parts, others = re.split(r"([^A-Za-z0-9]+)", text), re.split(r"([^A-Za-z0-9]+)", alike)
        if len(parts) > 1 and len(parts) == len(re.split(r"([^A-Za-z0-9]+)", other)):
            assert sum(a != b for a, b in zip(parts, others, strict=True)) <= 1
        else:
            assert len(alike) == len(text) and sum(a != b for a, b in zip(text, alike, strict=True)) <= 1


def test_look_alikes_stand_close_together() -> None:
    """Keys drawn as look-alikes share most of themselves with another one; others don't."""

    def near(alike: float) -> float:
        rng = random.Random(5)
        keys = draw_strings(rng, maker(rng, "uuid"), 60, alike=alike)
        groups = [key.split("-") for key in keys]
        close = [
            max(sum(a == b for a, b in zip(one, two, strict=True)) for two in groups if two is not one)
            for one in groups
        ]
        return sum(count >= 4 for count in close) / len(close)

    assert near(0.0) == 0.0 and near(0.9) > 0.8


def test_too_few_strings_and_unknown_kinds_are_refused() -> None:
    rng = random.Random(0)
    with pytest.raises(UserError, match="too few different strings"):
        draw_strings(rng, maker(rng, "city"), 500)
    with pytest.raises(UserError, match="Did you mean 'hash'"):
        maker(rng, "hsh")


@settings(deadline=None)
@given(seed=st.integers(0, 500), count=st.integers(1, 60), most=st.integers(0, 9), lines=st.booleans())
def test_a_question_is_answered_by_the_statements_of_its_keys_and_no_others(
    seed: int, count: int, most: int, lines: bool
) -> None:
    rng = random.Random(seed)
    wording = draw_line_wording(rng) if lines else draw_wording(rng)
    facts = draw_facts(rng, count, maker(rng, "uuid"), maker(rng, "number"), rng.randint(1, 3), alike=0.9)
    quiz = quiz_on(rng, wording, facts, most)
    assert len(quiz.further) <= most and len(quiz.statements) == sum(len(fact.values) for fact in facts)
    for number, (question, _) in enumerate([(quiz.question, ""), *quiz.further], start=-1):
        chosen = quiz.is_evidence if number < 0 else [answer == number for answer in quiz.answers]
        evidence = [text for text, wanted in zip(quiz.statements, chosen, strict=True) if wanted]
        rest = [text for text, wanted in zip(quiz.statements, chosen, strict=True) if not wanted]
        asked = [fact for fact in facts if any(has(question, text) for text in (fact.key, *fact.values))]
        assert 1 <= len(asked) <= 4
        assert len(evidence) == sum(len(fact.values) for fact in asked)
        assert all(any(has(text, fact.key) for fact in asked) for text in evidence)
        assert not any(has(text, fact.key) for fact in asked for text in rest)


@given(seed=st.integers(0, 300))
def test_named_questions_tell_what_they_ask_for(seed: int) -> None:
    rng = random.Random(seed)
    wording = draw_wording(rng)
    question = draw_question(rng, wording, named=True)
    assert wording.topic in question or question in wording.paraphrases


@given(seed=st.integers(0, 200), keys=st.integers(17, 64))
def test_a_text_can_hold_up_to_64_keys_of_a_kind(seed: int, keys: int) -> None:
    rng = random.Random(seed)
    quiz = draw_quiz(rng, draw_wording(rng), keys, 3)
    assert keys <= len(quiz.statements) <= keys + 3 and len(set(quiz.statements)) == len(quiz.statements)


def test_texts_are_encoded_together_as_one_by_one() -> None:
    encoder = TextEncoder(tiny_tokenizer())
    texts = ["The grass is green.\n", "", " 7f3a: x", "{'id': 'a'}"]
    assert [ids.tolist() for ids in encoder.encode_each(texts)] == [encoder.encode(text).tolist() for text in texts]
    assert all(ids.dtype == np.int32 for ids in encoder.encode_each(texts))


def test_registers_in_turn_keep_their_order() -> None:
    rng = random.Random(4)
    quizzes = [draw_quiz(rng, draw_wording(rng), 5, 3) for _ in range(3)]
    found = in_turn(quizzes, 9)
    assert found.statements == [text for quiz in quizzes for text in quiz.statements]
    assert found.question == quizzes[0].question and len(found.further) <= 9
    assert sum(found.is_evidence) == sum(quizzes[0].is_evidence)


def test_no_two_facts_of_a_text_are_told_alike() -> None:
    """All forms name all three places, or two where a line of a list does without the attribute."""
    for forms in FORMS.values():
        assert all(all(place in form for place in ("{key}", "{value}", "{attribute}")) for form in forms.statements)
        assert all("{key}" in form and "{value}" in form for form in forms.lines)
        assert all("{key}" in form for form in forms.questions) and all("{value}" in form for form in forms.reverse)


def test_texts_are_exact_and_evidence_is_where_labels_say() -> None:
    samples, num_further, num_several = registers(), 0, 0
    for index in range(30):
        sample = samples[index]
        assert len(sample.input_ids) == text_length(samples.context.config, index)
        num_further += len(sample.further)
        for question in sample.questions:
            gold, masked = page_labels(question, PAGE)
            assert len(gold) and not set(gold) & set(masked)
            num_several += len(question.positive_spans) > 1
            others = [q for q in sample.questions if q is not question]
            assert not any(set(question.positive_spans) & set(other.positive_spans) for other in others)
    assert num_further > 100 and num_several > 8


def test_most_pages_of_a_register_are_statements() -> None:
    """A whole register has a statement on every page: the first words of a form recur all over the text."""
    samples = registers(paper_format=1.0)
    crowded = sum(_is_crowded(samples[index]) for index in range(40))
    assert 16 <= crowded <= 38  # the rest stands in prose


def _is_crowded(sample: Stage1Sample) -> bool:
    """Whether what frames the evidence recurs on most pages: a start or an end of the statement, in tokens."""
    start, end = sample.positive_spans[0]
    text = decoded(sample.input_ids)
    evidence = decoded(sample.input_ids[start:end]).strip("\n")
    marks = [mark for mark in (evidence[:3], evidence[-3:]) if not re.fullmatch(r"[\w-]+", mark)] or [evidence[:4]]
    wanted = len(sample.input_ids) / PAGE / 2
    return max(text.count(mark) for mark in marks) >= wanted


def test_all_statements_of_a_question_are_in_the_text() -> None:
    """Lines that are too many are dropped; those of several keys asked for together are not."""
    samples, num_several = registers(paper_format=1.0), 0
    for index in range(40):
        for question in samples[index].questions:
            asked = decoded(question.question_ids).split("Question: ")[1].split("<|end|>")[0]
            if asked.count(" and ") - asked.count(" and copy out") == 1:
                num_several += 1
                assert len(question.positive_spans) > 1
    assert num_several > 20


def test_small_texts_hold_their_evidence() -> None:
    samples = registers(min_tokens=100, max_tokens=400)
    for index in range(40):
        sample = samples[index]
        assert len(sample.input_ids) < 1000 and len(page_labels(sample, 32)[0])


def test_held_out_registers_are_in_held_out_wordings() -> None:
    weights = {**dict.fromkeys(WEIGHTS, 0.0), "registers": 1.0}
    dev = Stage1Dataset(tiny_pool(), tiny_tokenizer(), tiny_config(weights=weights, paper_format=1.0), 100, "dev")
    for index in range(40):
        question = decoded(dev[index].question_ids).split("Question: ")[1].split("<|end|>")[0]
        for form in FORMS["train"].questions:
            if "{attribute}" in form and len(form) > 30:
                pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(form))
                assert not re.fullmatch(pattern, question), (form, question)
