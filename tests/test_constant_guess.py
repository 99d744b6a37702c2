"""math_find: what a constant guess scores, against lists as the task makes them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from report_rows import made_up_rows
from retrolm.evaluation.constant_guess import MATH_FIND, answer_shares, math_find_guess
from retrolm.evaluation.journal import write_lines
from retrolm.evaluation.report.results import load_results
from retrolm.evaluation.report.tables import score_tables
from retrolm.evaluation.tasks.infinitebench_generate import RANKS, NumberListGenerator

NUM_LISTS = 140


@pytest.mark.parametrize("kind", RANKS)
def test_answers_are_as_frequent_as_in_real_lists(kind: str) -> None:
    generator, rng = NumberListGenerator("{context} {question}"), random.Random(3)
    drafts = [generator.draft(1200, list(RANKS).index(kind), rng) for _ in range(NUM_LISTS)]
    shares, found = answer_shares(kind), Counter(float(draft.answers[0]) for draft in drafts)
    assert sum(shares.values()) == pytest.approx(1)
    in_reach = sum(count for answer, count in found.items() if any(abs(answer - known) <= 1 for known in shares))
    assert in_reach == NUM_LISTS
    for answer, share in shares.items():
        spread = (share * (1 - share) / NUM_LISTS) ** 0.5
        near = sum(found[answer + offset] for offset in ((0,) if kind != "median" else (-0.5, 0, 0.5)))
        assert near / NUM_LISTS < share + 6 * spread + (0.05 if kind == "median" else 0)


def test_the_guess_scores_about_five_percent() -> None:
    assert answer_shares("second largest")[90] == pytest.approx(1 / 21)
    assert answer_shares("smallest")[3] == pytest.approx(1 / 20)
    assert max(answer_shares("median").values()) == pytest.approx((2 / 20 + 0.5 / 21) / 2)
    assert 0.045 < math_find_guess() < 0.055


def test_the_report_states_it_beside_the_scores(tmp_path: Path) -> None:
    rows = [{**row, "task": MATH_FIND} for row in made_up_rows(2, (4096,)) if row["task"] == "ruler/niah_single_1"]
    write_lines(tmp_path / "samples.jsonl", rows)
    tables = score_tables(load_results([tmp_path]), "infinitebench", 4096)
    assert all("constant guess" in table.note and "scores 5." in table.note for table in tables)
