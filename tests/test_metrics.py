"""Scorers against published predictions, against the original metric packages' values, and by their properties."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrolm import metrics
from retrolm.metrics.rouge import lcs_indices

GOLDEN = Path(__file__).parent / "golden"
PAIRS = json.loads((GOLDEN / "metric_pairs.json").read_text(encoding="utf-8"))["pairs"]
WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "a", "Mat", "7"]), max_size=9)
TEXT = st.text(alphabet="ab the.\n7é", max_size=40)

# Scores in the benchmark's README, times 100; gpt4/kimi/claude2 in the order QA, summary, choice, number search.
PUBLISHED = {
    "gpt4": (22.44, 14.73, 67.25, 60.00),
    "kimi": (16.52, 17.96, 72.49, 12.57),
    "claude2": (11.97, 14.50, 62.88, 32.29),
}
SCORERS: dict[str, Callable[[str, Any], float]] = {
    "longbook_qa_eng": metrics.qa_f1,
    "longbook_sum_eng": metrics.rouge_lsum,
    "longbook_choice_eng": metrics.longbook_choice,
    "math_find": lambda prediction, label: metrics.math_find(
        prediction, label[0] if isinstance(label, list) else label
    ),
}
NUM_ROWS = dict(zip(SCORERS, (351, 103, 229, 350), strict=True))


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("index, task", list(enumerate(SCORERS)))
def test_published_predictions_get_the_published_scores(model: str, index: int, task: str) -> None:
    with gzip.open(GOLDEN / "infinitebench" / model / f"preds_{task}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    scores = [SCORERS[task](row["prediction"], row["ground_truth"]) for row in rows]
    assert len(rows) == NUM_ROWS[task]
    assert round(100 * sum(scores) / len(scores), 2) == PUBLISHED[model][index]


@pytest.mark.parametrize("pair", PAIRS)
def test_values_of_the_original_packages(pair: dict[str, Any]) -> None:
    prediction, reference = pair["prediction"], pair["reference"]
    assert metrics.qa_f1(prediction, [reference]) == pytest.approx(pair["qa_f1"], abs=1e-12)
    assert metrics.rouge_l(prediction, reference) == pytest.approx(pair["rouge_l"], abs=1e-12)
    assert metrics.rouge_lsum(prediction, [reference]) == pytest.approx(pair["rouge_lsum"], abs=1e-12)
    assert metrics.code_similarity(prediction, reference) == pair["code"]
    assert metrics.count_score(prediction, "7") == pair["count"]
    assert metrics.retrieval_score(prediction, "Paragraph 3") == pair["retrieval"]
    got = metrics.classification_score(pair["class_prediction"], pair["label"], pair["classes"])
    assert got == pair["classification"]


@given(TEXT, TEXT)
def test_qa_f1_is_symmetric_and_bounded(left: str, right: str) -> None:
    score = metrics.qa_f1(left, [right])
    assert score == pytest.approx(metrics.qa_f1(right, [left]))
    assert 0.0 <= score <= 1.0


@given(TEXT)
def test_text_against_itself_is_perfect_unless_empty(text: str) -> None:
    assert metrics.qa_f1(text, [text]) == float(bool(metrics.normalize_answer(text)))
    assert metrics.code_similarity(text.split("\n")[0], text.split("\n")[0]) == 1.0


@given(st.lists(TEXT, min_size=1, max_size=3), TEXT)
def test_more_answers_never_lower_the_score(answers: list[str], prediction: str) -> None:
    for metric in (metrics.qa_f1, metrics.rouge_lsum):
        assert metric(prediction, answers) >= metric(prediction, answers[:1])


@given(WORDS, WORDS)
@settings(max_examples=200)
def test_lcs_is_common_and_longest(reference: list[str], candidate: list[str]) -> None:
    picked = [reference[i] for i in sorted(lcs_indices(reference, candidate))]
    rest = iter(candidate)
    assert all(word in rest for word in picked)
    assert len(picked) == _lcs_length(reference, candidate)


def _lcs_length(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        before = row[:]
        for j, other in enumerate(right):
            row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
    return row[-1]


@given(st.lists(st.text("abcXYZ", min_size=1, max_size=4), min_size=1, max_size=5), TEXT)
def test_string_match_counts_references(references: list[str], noise: str) -> None:
    joined = noise + " ".join(reference.upper() for reference in references)
    assert metrics.string_match_all(joined, references) == 1.0
    assert metrics.string_match_part(joined, references) == 1.0
    assert metrics.string_match_all(noise, references) <= metrics.string_match_part(noise, references)


@pytest.mark.parametrize(
    "prediction, score",
    [
        ("B", 1.0),
        ("  B. the cat", 1.0),
        ("According to the text, B", 0.0),
        ("the cat", 1.0),
        ("My answer is: the cat", 1.0),
        ("My answer is: A", 0.0),
        ("I think the option is B", 1.0),
        ("it is BCD", 0.0),
        ("it is B, not A", 1.0),
        ("", 0.0),
        ("the answer is", 0.0),
    ],
)
def test_longbook_choice_rules(prediction: str, score: float) -> None:
    assert metrics.longbook_choice(prediction, ["the cat", "B"]) == score


@pytest.mark.parametrize(
    "prediction, label, score",
    [("88", 88, 1.0), ("about 88, or 90", 88, 1.0), ("88.0", 88, 0.0), ("44", 44.0, 1.0), ("none", 1, 0.0)],
)
def test_math_find_rules(prediction: str, label: float, score: float) -> None:
    assert metrics.math_find(prediction, label) == score


def test_retrieval_answers_of_infinitebench() -> None:
    assert metrics.first_integer("is 71432. Remember 9", "71432") == 1.0
    assert metrics.first_integer("no digits", "71432") == 0.0
    assert metrics.kv_retrieval('"ab-12".', "ab-12") == 1.0
    assert metrics.kv_retrieval("ab-123", "ab-12") == 0.0


def test_longbench_v2_needs_the_asked_wording() -> None:
    assert metrics.longbench_v2_choice("**The correct answer is (C)**", "C") == 1.0
    assert metrics.longbench_v2_choice("The correct answer is C.", "C") == 1.0
    assert metrics.longbench_v2_choice("C", "C") == 0.0


def test_clean_prediction_turns_control_characters_into_newlines() -> None:
    assert metrics.clean_prediction(" \x00a\tb\x1f ") == "a\nb"


def test_retrieval_score_refuses_an_answer_without_paragraph() -> None:
    with pytest.raises(ValueError, match="Paragraph 7"):
        metrics.retrieval_score("3", "Passage 3")


def test_rouge_l_of_a_text_without_words_is_zero() -> None:
    assert metrics.rouge_l(".", "a cat") == 0.0
    assert metrics.rouge_l("", "a cat") == 0.0
