"""The report: every figure follows from the rows, every table and plot is there, one page without other files."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli_runner import run_cli
from report_rows import METHODS, made_up_rows, write_run
from retrolm.errors import UserError
from retrolm.evaluation.journal import write_lines
from retrolm.evaluation.report.results import Results, load_results
from retrolm.evaluation.report.tables import (
    BEYOND,
    MISSING,
    difference_table,
    overview_table,
    score_tables,
    shared_scores,
)
from retrolm.evaluation.report.write import write_report
from retrolm.evaluation.statistics import average_interval, paired_difference, score_interval
from retrolm.evaluation.tasks import GROUPS

NEEDLES = GROUPS["ruler-needles"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def results(run: Path) -> Results:
    return load_results([run])


@pytest.fixture(scope="module")
def report(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("report")
    write_report([run], out)
    return out


class Page(HTMLParser):
    """Cells and sources of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.sources: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag in ("td", "th")
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._inside and data.strip():
            self.cells.append(data)


def test_scores_and_averages_follow_from_the_rows(results: Results) -> None:
    rows = made_up_rows()
    dense, streaming = score_tables(results, "ruler", 4096)
    assert len(dense.rows) == 1 and len(streaming.rows) == len(METHODS) - 1
    assert dense.columns[-1] == "average ruler-needles"
    means = []
    for task, shown in zip(NEEDLES, dense.rows[0][2:], strict=False):
        own = [r["score"] for r in rows if (r["task"], r["length"], r["method"]) == (task, 4096, "full")]
        means.append(sum(own) / len(own))
        assert shown.startswith(f"{100 * means[-1]:.1f} [")
    assert dense.rows[0][-1].startswith(f"{sum(means) / 8 * 100:.1f} [")


def test_an_incomplete_group_has_no_average(tmp_path: Path) -> None:
    rows = [row for row in made_up_rows(3, (4096,)) if row["method"] == "full" or row["task"] != NEEDLES[0]]
    write_lines(tmp_path / "samples.jsonl", rows)
    dense, streaming = score_tables(load_results([tmp_path]), "ruler", 4096)
    assert dense.rows[0][-1] != MISSING
    assert all(row[-1] == row[2] == MISSING for row in streaming.rows)
    assert all(row[3] == MISSING for row in overview_table(load_results([tmp_path])).rows[1:])


def test_dense_attention_beyond_the_window_is_marked(results: Results) -> None:
    dense, streaming = score_tables(results, "ruler", 65536)
    assert all(cell.endswith(BEYOND) for cell in dense.rows[0][2:]) and "window" in dense.note
    assert not any(BEYOND in cell for row in streaming.rows for cell in row[1:])


def test_differences_pair_shared_samples_only(results: Results, tmp_path: Path) -> None:
    table = difference_table(results, "ruler", 4096)
    assert len(table.rows) == len(METHODS) - 1
    assert all(row[2] == str(25 * 8) for row in table.rows)
    rows = [row for row in made_up_rows(6, (4096,)) if row["method"] == "full" or int(row["sample_id"]) < 4]
    write_lines(tmp_path / "samples.jsonl", rows)
    part = load_results([tmp_path])
    base, ours = part.columns()[0], part.columns()[1]
    left, right = shared_scores(part, ours, base, NEEDLES, 4096)
    assert len(left) == len(right) == 4 * 8
    wanted = [r["score"] for r in rows if r["method"] == "full" and int(r["sample_id"]) < 4]
    assert right == wanted


def test_folders_are_joined_and_repeated_rows_count_once(run: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", made_up_rows(25, (4096,)))
    assert len(load_results([run, tmp_path]).samples) == len(made_up_rows())
    with pytest.raises(UserError, match="holds neither"):
        load_results([tmp_path / "nowhere"])


def test_cells_of_other_settings_are_told_apart(tmp_path: Path) -> None:
    rows = [row for row in made_up_rows(2, (4096,)) if row["method"] == "recency"]
    other = [{**row, "key": f"{row['key']}x", "config_hash": f"{row['config_hash']}x"} for row in rows]
    write_lines(tmp_path / "samples.jsonl", [*rows, *other])
    names = [column.name for column in load_results([tmp_path]).columns()]
    assert len(set(names)) == len(names) > 2 and all("settings" in name for name in names)


def test_all_files_are_written_and_the_page_needs_no_other(report: Path) -> None:
    names = {path.name for path in report.iterdir()}
    assert {"report.md", "report.html", "cells.csv", "ruler-by-length.png", "ruler-memory.png"} <= names
    assert "ruler-4096-by-budget.png" in names
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    markdown = (report / "report.md").read_text(encoding="utf-8")
    cells = {cell.strip() for line in markdown.splitlines() if line.startswith("| ") for cell in line.split("|")[1:-1]}
    assert set(map(str.strip, page.cells)) == {cell for cell in cells if cell and not re.fullmatch("-+:?", cell)}
    for name in re.findall(r"!\[.*\]\((.*)\)", markdown):
        assert (report / name).read_bytes().startswith(b"\x89PNG")


def test_csv_has_one_line_per_cell(report: Path) -> None:
    with (report / "cells.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(METHODS) * 3 * 8
    assert {"task", "score", "attended_tokens.prefill", "versions.torch", "score_ci"} <= set(rows[0])
    assert json.loads(rows[0]["score_ci"])[0] <= float(rows[0]["score"])


def test_text_is_escaped_in_the_page(tmp_path: Path) -> None:
    rows = [{**row, "model": "<script>x</script>"} for row in made_up_rows(2, (4096,))]
    write_lines(tmp_path / "samples.jsonl", rows)
    write_report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_the_page_renders_in_a_browser(report: Path, tmp_path: Path) -> None:
    """Only where a browser is installed is it used; the page's structure is tested above in any case."""
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        return
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run(
        [browser, *arguments, (report / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Overview: mean over tasks" in done.stdout and done.stdout.count("<img") >= 4


def test_the_command_lists_its_files_and_refuses_empty_folders(run: Path, tmp_path: Path) -> None:
    outcome = run_cli("report", run, "--out", tmp_path / "out")
    assert outcome.code == 0
    assert all(Path(line).is_file() for line in outcome.out.splitlines())
    run_cli("report", tmp_path / "nothing", "--out", tmp_path).refused_in_one_line("holds neither")


# --- statistics ----------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60))
def test_wilson_intervals_hold_the_mean_and_never_collapse(scores: list[float]) -> None:
    low, high = score_interval(scores)
    mean = sum(scores) / len(scores)
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1 and high - low > 0.01


def test_wilson_matches_published_values() -> None:
    """Newcombe 1998, Table I, method 3."""
    assert score_interval([1.0] * 81 + [0.0] * 182) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert score_interval([0.0] * 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_bootstrap_intervals_hold_the_mean(scores: list[float]) -> None:
    low, high = score_interval([*scores, 0.5])
    assert low - 1e-9 <= np.mean([*scores, 0.5]) <= high + 1e-9


def test_paired_difference_sees_what_unpaired_would_not() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.random(60)
    found = paired_difference(list(theirs + 0.05), list(theirs))
    assert found.difference == pytest.approx(0.05) and found.low > 0 and found.p_value < 0.001
    same = paired_difference([0.5] * 9, [0.5] * 9)
    assert (same.difference, same.p_value) == (0, 1.0)


def test_the_average_of_one_is_itself_and_of_many_is_tighter() -> None:
    assert average_interval([0.5], [(0.3, 0.6)]) == pytest.approx((0.3, 0.6))
    low, high = average_interval([0.5] * 4, [(0.3, 0.7)] * 4)
    assert (low, high) == pytest.approx((0.4, 0.6))
