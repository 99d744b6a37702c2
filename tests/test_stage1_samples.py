"""Samples: exact lengths, evidence where it is said to be, and nothing but a function of (seed, index)."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from retrolm.errors import UserError
from retrolm.training.data import Stage1Dataset, Stage1Sample, page_labels
from retrolm.training.data.frames import PAPER_INSTRUCTION
from retrolm.training.data.mixture import text_length
from retrolm.training.data.pieces import Piece, Role, cut_to_length, join
from stage1_pool_maker import WEIGHTS, tiny_config, tiny_pool
from tiny_tokenizer import tiny_tokenizer

NATURAL = ("wiki", "chat")


def dataset(num_samples: int = 10_000, split: Any = "train", **changes: Any) -> Stage1Dataset:
    return Stage1Dataset(tiny_pool(), tiny_tokenizer(), tiny_config(**changes), num_samples, split)


def decoded(ids: np.ndarray[Any, Any]) -> str:
    return str(tiny_tokenizer().decode(ids.tolist()))


def evidence(sample: Stage1Sample) -> str:
    return " ".join(decoded(sample.input_ids[start:end]) for start, end in sample.positive_spans)


def equal(a: Stage1Sample, b: Stage1Sample) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "question_ids", "prefix_ids"))
    return arrays and (a.positive_spans, a.source) == (b.positive_spans, b.source)


@pytest.mark.parametrize("part", sorted(WEIGHTS))
def test_every_part_builds_exact_lengths_and_evidence(part: str) -> None:
    weights = {**dict.fromkeys(WEIGHTS, 0.0), **dict.fromkeys(NATURAL, 1e-9), part: 1000.0}
    samples = dataset(weights=weights)
    for index in range(200 if part == "facts" else 40):  # lists of facts are as long as they happen to be
        sample = samples[index]
        assert sample.input_ids.dtype == sample.question_ids.dtype == sample.prefix_ids.dtype == np.int32
        assert len(sample.input_ids) == text_length(samples.context.config, index)
        assert sample.positive_spans and len(sample.question_ids) > 0
        assert all(0 <= start < end <= len(sample.input_ids) for start, end in sample.positive_spans)
        assert len(page_labels(sample, 128)[0]) >= 1


def test_the_chat_template_is_around_text_and_question() -> None:
    sample = dataset(paper_format=1.0)[3]
    assert decoded(sample.prefix_ids) == "<|user|>"
    assert decoded(sample.input_ids).startswith(PAPER_INSTRUCTION)
    question = decoded(sample.question_ids)
    assert question.startswith("\nNow, find key information for the question.\nQuestion: ")
    assert "<|end|><|assistant|>" in question


def test_natural_questions_find_their_passage_and_only_that() -> None:
    samples = dataset(weights={"wiki": 1}, paper_format=1.0)
    for index in range(30):
        sample = samples[index]
        village = decoded(sample.question_ids).split("Who founded ")[1].split()[0]
        assert evidence(sample).count(village) == decoded(sample.input_ids).count(village) >= 1


def test_facts_hold_the_asked_key_or_value() -> None:
    samples = dataset(weights={"facts": 1}, paper_format=1.0)
    for index in range(60):
        sample = samples[index]
        question = decoded(sample.question_ids).split("Question: ")[1].split("<|end|>")[0]
        words = {word.strip('?,.:"|[]()').removesuffix("'s") for word in question.split()}
        spans = [decoded(sample.input_ids[s:e]) for s, e in sample.positive_spans]
        assert all(any(word and word in span for word in words) for span in spans), (question, spans)


def test_removed_quotes_are_gone_from_the_text() -> None:
    samples = dataset(weights={"sentences": 1}, paper_format=1.0)
    gone = 0
    for index in range(40):
        sample = samples[index]
        quote = decoded(sample.question_ids).split("Question: ")[1].split("<|end|>")[0]
        gone += quote not in decoded(sample.input_ids)
    assert 20 <= gone <= 39  # four in five, minus sentences that are most of their passage


def test_the_same_index_gives_the_same_sample_in_any_order() -> None:
    first, second = dataset(), dataset()
    indices = list(range(60))
    forward = {index: first[index] for index in indices}
    random.Random(1).shuffle(indices)
    assert all(equal(second[index], forward[index]) for index in indices)


def test_workers_and_pickled_copies_agree() -> None:
    samples = dataset(num_samples=12)
    plain = [samples[index] for index in range(12)]
    loader = DataLoader(samples, batch_size=None, num_workers=2)
    assert all(equal(a, b) for a, b in zip(plain, loader, strict=True))
    copy = pickle.loads(pickle.dumps(samples))
    assert equal(copy[7], plain[7])


def test_seed_and_split_change_samples() -> None:
    assert not equal(dataset()[5], dataset(seed=6)[5])
    dev = dataset(split="dev", weights={"wiki": 1, "chat": 1})
    train = dataset(weights={"wiki": 1, "chat": 1})
    asked = {decoded(train[i].question_ids).split("(question")[1] for i in range(150)}
    assert not asked & {decoded(dev[i].question_ids).split("(question")[1] for i in range(40)}


def test_length_can_be_given() -> None:
    assert [len(dataset().sample(3, n).input_ids) for n in (600, 1024, 3000)] == [600, 1024, 3000]


def test_beyond_the_end() -> None:
    with pytest.raises(IndexError):
        dataset(num_samples=3)[3]


def test_a_part_that_the_pool_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"no train question for: wikki.*Did you mean 'wiki'"):
        dataset(weights={"wikki": 1})
    with pytest.raises(UserError, match="people's questions"):
        dataset(weights={"composed": 1})


def test_rows_are_used_up_before_any_is_repeated() -> None:
    samples = dataset(weights={"wiki": 1}, paper_format=1.0)
    count = len(samples.context.pool.rows_of("wiki", "train"))
    asked = [decoded(samples.sample(i, 600).question_ids) for i in range(2 * count)]
    assert len(set(asked[:count])) == len(set(asked[count:])) == count
    assert asked[:count] != asked[count:]


@settings(deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.sampled_from(list(Role)), st.integers(0, 5)), max_size=12),
    limit=st.integers(0, 300),
    seed=st.integers(0, 5),
)
def test_cutting_and_joining(lengths: list[tuple[int, Role, int]], limit: int, seed: int) -> None:
    pieces = [
        Piece(np.full(n, i, np.int32), role, np.full(lead, -1, np.int32)) for i, (n, role, lead) in enumerate(lengths)
    ]
    kept = cut_to_length(pieces, limit, random.Random(seed))
    ids, spans, masked = join(kept)
    firm = sum(len(piece) for piece in pieces if piece.role is not Role.FILLER)
    assert len(ids) == max(firm, min(limit, sum(map(len, pieces))))
    wanted = [i for i, (n, role, _) in enumerate(lengths) if role is Role.EVIDENCE and n]
    assert [(ids[s], e - s) for s, e in spans] == [(i, lengths[i][0]) for i in wanted]
    hidden = [i for i, (n, role, _) in enumerate(lengths) if role is Role.MASKED and n]
    assert [(ids[s], e - s) for s, e in masked] == [(i, lengths[i][0]) for i in hidden]


def test_config_is_frozen_and_checked() -> None:
    config = tiny_config()
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]
    assert replace(config, seed=3).seed == 3


def test_no_further_questions_unless_asked_for() -> None:
    samples = dataset()
    assert not any(samples[index].further for index in range(40))


@pytest.mark.parametrize("part", ["wiki", "chat", "cloze", "facts", "transcripts", "composed"])
def test_further_questions_have_their_evidence_where_they_say(part: str) -> None:
    weights = {**dict.fromkeys(WEIGHTS, 0.0), **dict.fromkeys(NATURAL, 1e-9), part: 1000.0}
    samples = dataset(weights=weights, further_questions=5, max_keys=8, min_tokens=1500, max_tokens=3000)
    total = 0
    for index in range(40):
        sample = samples[index]
        assert len(sample.input_ids) == text_length(samples.context.config, index)
        assert len(sample.further) <= 5
        total += len(sample.further)
        for question in sample.further:
            assert question.positive_spans and len(question.question_ids)
            assert all(0 <= start < end <= len(sample.input_ids) for start, end in question.positive_spans)
            assert not set(question.positive_spans) & set(sample.positive_spans)
    assert total >= 20
    assert equal(samples[7], samples[7]) and [
        (q.positive_spans, q.question_ids.tolist()) for q in samples[7].further
    ] == [(q.positive_spans, q.question_ids.tolist()) for q in samples[7].further]


def test_further_facts_are_stated_where_the_labels_point() -> None:
    """Each further question names its key, and the labelled span states a fact on that very key."""
    weights = {**dict.fromkeys(WEIGHTS, 0.0), "facts": 1.0}
    samples = dataset(weights=weights, further_questions=4, max_keys=8)
    checked = 0
    for index in range(60):
        sample = samples[index]
        for question in sample.further:
            asked = set(decoded(question.question_ids).split())
            own = " ".join(decoded(sample.input_ids[s:e]) for s, e in question.positive_spans).split()
            others = [set(decoded(sample.input_ids[s:e]).split()) for s, e in sample.positive_spans]
            common = asked & set(own)
            checked += bool(others) and len(common) > min(len(asked & other) for other in others)
    assert checked > 20
