"""The paper's averages recomputed from its own columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retrolm.errors import UserError
from retrolm.evaluation.averages import average, by_bucket, mean, percent
from retrolm.evaluation.tasks import GROUPS, expand_tasks, get_task, list_tasks

PAPER = json.loads((Path(__file__).parent / "golden" / "paper_tables.json").read_text(encoding="utf-8"))
ROWS = [(number, table, row) for number, table in PAPER["tables"].items() for row in table["rows"]]
INCONSISTENT = {(entry["table"], entry["row"]): entry for entry in PAPER["inconsistent"]}
ROUNDING = 0.05 + 1e-9  # the paper prints one decimal


def _average(table: dict[str, Any], row: dict[str, Any]) -> float | None:
    if table["group"] is None:
        return mean(row["values"])
    return average(dict(zip(table["columns"], row["values"], strict=True)), GROUPS[table["group"]])


@pytest.mark.parametrize("number, table, row", ROWS)
def test_printed_averages_follow_from_the_columns(number: str, table: dict[str, Any], row: dict[str, Any]) -> None:
    found = _average(table, row)
    known = INCONSISTENT.get((number, row["row"]))
    if known is None:
        assert found == pytest.approx(row["average"], abs=ROUNDING)
    else:
        assert row["average"] == known["printed"]
        assert found == pytest.approx(known["recomputed"], abs=1e-9)
        assert found is not None and abs(found - row["average"]) > ROUNDING


def test_all_rows_of_the_paper_are_there() -> None:
    assert {number: len(table["rows"]) for number, table in PAPER["tables"].items()} == {
        "1": 18,
        "2 and 5": 14,
        "3": 7,
        "4": 2,
    }


def test_groups_name_tasks_and_match_the_papers_columns() -> None:
    assert all(set(members) <= set(list_tasks()) for members in GROUPS.values())
    for table in PAPER["tables"].values():
        if table["group"]:
            assert sorted(table["columns"]) == sorted(GROUPS[table["group"]])


def test_there_is_no_average_over_part_of_a_group() -> None:
    scores = dict.fromkeys(GROUPS["longbench-qa6"][1:], 1.0)
    assert average(scores, GROUPS["longbench-qa6"]) is None
    assert average(scores, GROUPS["longbench-qa6"][1:]) == 1.0
    with pytest.raises(UserError, match="at least one"):
        mean([])


def test_percent_and_buckets() -> None:
    assert percent([1.0, 0.0, 0.5]) == 50.0
    assert percent([1 / 3]) == 33.33
    assert by_bucket([1.0, 0.0, 0.5], ["8k+", "0-4k", "8k+"]) == {"0-4k": 0.0, "8k+": 75.0}


def test_tasks_and_groups_are_found_by_name() -> None:
    assert len(list_tasks()) == 13 + 16 + 13 + 1 + 7 + 7 + 1 + 1
    assert len(GROUPS["ruler-needles"]) == 8
    assert expand_tasks(["ruler/vt", "ruler-needles", "ruler/vt"]) == ["ruler/vt", *GROUPS["ruler-needles"]]
    assert all(get_task(name).name == name for name in list_tasks())
    with pytest.raises(UserError, match="Did you mean 'ruler/vt'"):
        get_task("ruler/v")
    with pytest.raises(UserError, match="ruler-needles"):
        expand_tasks(["ruler-needle"])
    with pytest.raises(UserError, match="no options"):
        get_task("longbench/trec", essays="x")
