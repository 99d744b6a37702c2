"""The report: every figure follows from the rows, every table and plot is there, one page without other files."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import re
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
from retrolm.evaluation.report.costs import cost_table
from retrolm.evaluation.report.pairs import MARGIN, compare, pair_rows, pair_tables, scopes, shared_scores
from retrolm.evaluation.report.plots import SCORE, Line, apart, by_length, comparable_lengths, drawn
from retrolm.evaluation.report.results import Results, load_results
from retrolm.evaluation.report.table import BEYOND, MISSING
from retrolm.evaluation.report.tables import overview_table, score_tables
from retrolm.evaluation.report.write import write_report
from retrolm.evaluation.runner import SAMPLES_FILE
from retrolm.evaluation.statistics import PairedDifference, average_interval, paired_average, score_interval
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


def test_differences_pair_shared_samples_only(tmp_path: Path) -> None:
    rows = [row for row in made_up_rows(6, (4096,)) if row["method"] == "full" or int(row["sample_id"]) < 4]
    write_lines(tmp_path / "samples.jsonl", rows)
    part = load_results([tmp_path])
    base, ours = part.columns()[0], part.columns()[1]
    (scope, *_) = scopes(part)
    cells = [part.cell(column, NEEDLES[0], 4096) for column in (ours, base)]
    assert cells[0] is not None and cells[1] is not None
    left, right = shared_scores(part, cells[0], cells[1])
    assert len(left) == len(right) == 4
    own = [r for r in rows if r["method"] == "full" and int(r["sample_id"]) < 4]
    assert right == [r["score"] for r in own if r["task"] == NEEDLES[0]]
    pair = compare(part, scope, ours, base)
    assert pair is not None and (pair.num_tasks, pair.found.num_pairs) == (8, 32)


def test_pairs_stand_in_blocks_with_intervals_tests_and_marks(results: Results) -> None:
    tables = {table.title: table for table in pair_tables(results)}
    against_dense = tables["ruler, 4K tokens: paired difference to dense attention (streaming prefill)"]
    assert len(against_dense.rows) == len(METHODS) - 1 and not against_dense.note
    assert {row[2] for row in against_dense.rows} == {"8"} and {row[3] for row in against_dense.rows} == {"200"}
    assert {row[6] for row in against_dense.rows} == {"McNemar"}
    ours = tables[
        "ruler, 4K tokens: retrolm (tiny-retriever), 2048 tokens, less the method of the row (streaming prefill)"
    ]
    assert {row[1] for row in ours.rows} == {"2048"} and all(row[4].startswith("+") for row in ours.rows)
    assert all(row[7] == "yes" and row[5] == "< 0.001" for row in ours.rows)
    beyond = tables["ruler, 64K tokens: paired difference to dense attention (streaming prefill)"]
    assert all(row[4].endswith(BEYOND) for row in beyond.rows) and "window" in beyond.note


def test_all_pairs_are_in_the_file_of_pairs(results: Results) -> None:
    rows = pair_rows(results)
    assert len(rows) == 3 * len(METHODS) * (len(METHODS) - 1) // 2
    for row in rows:
        assert row["low"] <= row["difference"] <= row["high"] and 0 < row["p_value"] <= 1
        assert row["not_below"] == (row["low"] >= -MARGIN)


@pytest.mark.parametrize("count", [3, 10, 34])
def test_all_names_of_a_plot_are_within_it(count: int) -> None:
    points = [(4096.0, 50.0, 40.0, 60.0), (8192.0, 40.0, 30.0, 50.0)]
    kinds = [None, *(("dense", "streaming")[n % 2] for n in range(1, count))]
    lines = [Line(f"some_long_method_name_{n} (a-retriever), 2048 tokens", points, kinds[n]) for n in range(count)]
    figure = drawn("title", "prompt length (tokens)", SCORE, lines)
    figure.draw_without_rendering()
    legends = [axes.get_legend() for axes in figure.axes]
    assert {text.get_text() for legend in legends for text in legend.texts} == {line.label for line in lines}
    assert len(legends) == (1 if count <= 10 else 2) and all(
        legend.texts[0].get_text() == lines[0].label for legend in legends
    )
    for box in (legend.get_window_extent() for legend in legends):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0


def test_names_of_close_lengths_do_not_run_into_each_other() -> None:
    assert apart([4096, 8192, 30720, 32768, 65536]) == [4096, 8192, 32768, 65536]
    assert apart([512]) == [512] and apart([]) == []


def test_full_attention_alone_is_in_every_panel(tmp_path: Path) -> None:
    rows = made_up_rows(2, (4096,))
    for row in rows:
        row["kv_budget"] = None if row["method"] == "mean_key" else row["kv_budget"]
    write_lines(tmp_path / SAMPLES_FILE, rows)
    lines = by_length(load_results([tmp_path]), "ruler", lambda cells: (1.0, 1.0, 1.0))
    assert {line.label for line in lines if line.prefill is None} == {"full"}


@pytest.mark.parametrize(("highest", "top"), [(40.0, 44.0), (99.0, 103.0)])
def test_the_axis_of_scores_ends_where_they_do(highest: float, top: float) -> None:
    points = [(4096.0, 10.0, 5.0, highest), (8192.0, 10.0, 5.0, 20.0)]
    (axes,) = drawn("title", "prompt length (tokens)", SCORE, [Line("full", points)]).axes
    assert axes.get_ylim() == pytest.approx((0.0, top))


def test_lines_join_means_of_the_same_tasks_only(tmp_path: Path) -> None:
    rows = made_up_rows(4, (4096, 8192, 30000, 65536))
    few = [row for row in rows if row["length"] != 30000 or row["task"] == NEEDLES[0]]
    write_lines(tmp_path / SAMPLES_FILE, [row for row in few if row["length"] != 65536 or row["task"] != NEEDLES[1]])
    assert comparable_lengths(load_results([tmp_path]), "ruler") == [4096, 8192, 65536]


def test_an_average_of_ones_own_is_compared_too(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", made_up_rows(4, (4096,)))
    part = load_results([tmp_path], {"two": NEEDLES[:2]})
    found = {scope.title: scope.tasks for scope in scopes(part)}
    assert found["average two, 4K tokens"] == NEEDLES[:2]
    dense, _ = score_tables(part, "ruler", 4096)
    assert "average two" in dense.columns
    assert any(row["scope"] == "average two, 4K tokens" and row["num_pairs"] == 8 for row in pair_rows(part))


def test_a_name_of_ones_own_for_a_known_average_stands_in_its_place(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", made_up_rows(4, (4096,)))
    dense, _ = score_tables(load_results([tmp_path], {"eight needles": NEEDLES}), "ruler", 4096)
    assert [name for name in dense.columns if name.startswith("average")] == ["average eight needles"]


def test_one_table_holds_scores_times_and_memory(run: Path, tmp_path: Path) -> None:
    """Costs come from other rows; a method that lacks a task of a group, or has no such rows, says so."""
    alone = made_up_rows(num_samples=3, lengths=(8192,))
    kept = [row for row in alone if row["method"] != "recency" and row["task"] == "ruler/niah_single_2"]
    for name in ("alone", "scored"):
        (tmp_path / name).mkdir()
    write_lines(tmp_path / "alone" / "samples.jsonl", [{**row, "ttft_s": 7.0, "tpot_s": 0.003} for row in kept])
    rows = [r for r in made_up_rows(5) if (r["method"], r["task"]) != ("mean_key", "ruler/niah_multikey_1")]
    write_lines(tmp_path / "scored" / "samples.jsonl", rows)
    words = ["--matrix", "one=ruler/niah_single_2", "--matrix", "two=ruler/niah_single_2,ruler/niah_multikey_1"]
    done = run_cli("report", tmp_path / "scored", "--out", tmp_path / "out", *words, "--costs", tmp_path / "alone")
    assert done.code == 0, done
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("## All methods; times and memory at 8K tokens") < text.index("## Overview")
    lines = [line.split(" | ") for line in text.split("## Overview")[0].splitlines() if line.startswith("| ")]
    head, full = lines[0], lines[2]
    assert head[3:6] == ["one 4K tokens", "one 8K tokens", "one 64K tokens"] and len(head) == 3 + 6 + 3
    assert full[0] == "| full" and full[5].endswith("*") and full[9:11] == ["7.00", "3.0"]
    scores = [
        r["score"] for r in rows if (r["method"], r["task"], r["length"]) == ("full", "ruler/niah_single_2", 4096)
    ]
    assert full[3] == f"{100 * sum(scores) / len(scores):.1f}"
    assert "Samples per task and length: 5." in text
    by_name = {line[0].removeprefix("| "): line for line in lines[2:]}
    assert by_name["mean_key"][6:9] == [MISSING] * 3 != by_name["mean_key"][3:6]
    assert by_name["recency"][9:11] == [MISSING] * 2
    run_cli("report", run, "--out", tmp_path / "o", "--costs", run).refused_in_one_line("--costs needs --matrix")
    run_cli("report", run, "--out", tmp_path / "o", "--matrix", "one=").refused_in_one_line("--matrix needs NAME=TASK")


def test_what_a_method_leaves_dense_stands_beside_its_budget(tmp_path: Path) -> None:
    rows = made_up_rows(2, (4096,))
    rows[0]["attended_tokens"] |= {"dense_heads": 4090}
    write_lines(tmp_path / "samples.jsonl", rows)
    part = load_results([tmp_path])
    cells = [row[4] for row in cost_table(part, 4096).rows]
    (said,) = [cell for cell in cells if "dense" in cell]
    assert said.endswith(" (dense parts 4,090)") and len(cells) == len(METHODS)


def test_folders_are_joined_and_repeated_rows_count_once(run: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", made_up_rows(25, (4096,)))
    assert len(load_results([run, tmp_path]).samples) == len(made_up_rows())
    with pytest.raises(UserError, match="holds neither"):
        load_results([tmp_path / "nowhere"])


def test_packed_rows_are_read_like_others(run: Path, tmp_path: Path) -> None:
    plain = (run / SAMPLES_FILE).read_bytes()
    for end, packed in ((".gz", gzip.compress(plain)), (".xz", lzma.compress(plain))):
        (tmp_path / end).mkdir()
        (tmp_path / end / f"{SAMPLES_FILE}{end}").write_bytes(packed)
        assert load_results([tmp_path / end]).samples == load_results([run]).samples


def test_cells_of_other_settings_are_told_apart(tmp_path: Path) -> None:
    rows = [row for row in made_up_rows(2, (4096,)) if row["method"] == "recency"]
    other = [{**row, "key": f"{row['key']}x", "config_hash": f"{row['config_hash']}x"} for row in rows]
    write_lines(tmp_path / "samples.jsonl", [*rows, *other])
    names = [column.name for column in load_results([tmp_path]).columns()]
    assert len(set(names)) == len(names) > 2 and all("settings" in name for name in names)


def test_settings_name_a_column_over_all_lengths(tmp_path: Path) -> None:
    """Cells of one setting have hashes of their own, and still stand in one line."""
    rows = [row for row in made_up_rows(2, (4096, 8192)) if row["method"] == "recency" and row["kv_budget"] == 2048]
    changed = {"settings": "num_local_pages=2"}
    other = [{**r, "key": f"{r['key']}x", "config_hash": f"{r['config_hash']}x", **changed} for r in rows]
    write_lines(tmp_path / "samples.jsonl", rows + other)
    found = load_results([tmp_path])
    assert [column.name for column in found.columns()] == [
        "recency, 2048 tokens",
        "recency (num_local_pages=2), 2048 tokens",
    ]
    assert all(found.cell(column, NEEDLES[0], length) for column in found.columns() for length in (4096, 8192))


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


def test_the_command_lists_its_files_and_refuses_empty_folders(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_samples=2, lengths=(4096,))
    outcome = run_cli("report", run, "--out", tmp_path / "out")
    assert outcome.code == 0
    assert all(Path(line).is_file() for line in outcome.out.splitlines())
    run_cli("report", tmp_path / "nothing", "--out", tmp_path).refused_in_one_line("holds neither")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("samples.jsonl", b"", ["no rows", "retrolm eval"]),
        ("samples.jsonl", b'{"a": 1}\n', ["line 1", "key", "score"]),
        ("samples.jsonl", b"\xff\xfe\n", ["line 1", "isn't JSON"]),
        ("samples.jsonl.gz", b"not packed\n", ["can't be unpacked"]),
        ("samples.jsonl.gz", gzip.compress(json.dumps(list(range(999))).encode())[:40], ["can't be unpacked"]),
        ("samples.jsonl.xz", lzma.compress(json.dumps(list(range(999))).encode())[:40], ["can't be unpacked"]),
        ("samples.jsonl.xz", b"not packed\n", ["can't be unpacked"]),
    ],
    ids=["empty", "no row", "no text", "not packed", "cut off", "xz cut off", "no xz"],
)
def test_broken_files_of_rows_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    run_cli("report", tmp_path, "--out", tmp_path / "out").refused_in_one_line(*parts)


# --- statistics ----------------------------------------------------------------------------------------------------


def paired(ours: list[float], theirs: list[float]) -> PairedDifference:
    return paired_average([(ours, theirs)])


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
    found = paired(list(theirs + 0.05), list(theirs))
    assert found.difference == pytest.approx(0.05) and found.low > 0 and found.p_value < 0.001
    same = paired([0.5] * 9, [0.5] * 9)
    assert (same.difference, same.p_value, same.test) == (0, 1.0, "sign flips")


@given(st.floats(0, 1), st.integers(1, 30))
def test_equal_scores_still_leave_room_for_others(score: float, count: int) -> None:
    low, high = score_interval([score] * count)
    assert 0 <= low <= score + 1e-9 and score - 1e-9 <= high <= 1 and high - low > 0.1


def test_one_question_says_nothing_of_the_next() -> None:
    alone = paired([1.0], [0.25])
    assert (alone.difference, alone.low, alone.high) == (0.75, -1.0, 1.0)


def test_tasks_of_one_question_each_are_resampled_together() -> None:
    gaps = [1.0, 1.0, -1.0, 1.0, -1.0, 0.0, 1.0, 0.5]
    found = paired_average([([max(gap, 0.0)], [max(-gap, 0.0)]) for gap in gaps])
    pooled = paired([max(gap, 0.0) for gap in gaps], [max(-gap, 0.0) for gap in gaps])
    assert found.difference == pytest.approx(np.mean(gaps))
    assert (found.low, found.high) == pytest.approx((pooled.low, pooled.high)) and found.low < -0.1
    mixed = paired_average([([1.0], [0.0]), ([1.0, 0.0] * 20, [0.0, 0.0] * 20)])
    assert mixed.difference == pytest.approx(0.75) and mixed.low < 0.5


def test_mcnemar_is_exact() -> None:
    """Of 14 questions that differ 12 are better: 2 * (1 + 14 + 91) / 2^14."""
    ours, theirs = [1.0] * 12 + [0.0] * 2 + [1.0] * 9, [0.0] * 12 + [1.0] * 2 + [1.0] * 9
    found = paired(ours, theirs)
    assert found.test == "McNemar" and found.p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert found.difference == pytest.approx(10 / 23) and found.low < 10 / 23 < found.high


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=5, max_size=40))
def test_sign_flips_agree_with_the_exact_test(gaps: list[float]) -> None:
    """On scores of 0 and 1, moved off them by a constant, the permutation test is McNemar's up to its draws."""
    theirs = [0.5 - gap / 2 for gap in gaps]
    exact = paired([max(gap, 0.0) for gap in gaps], [max(-gap, 0.0) for gap in gaps])
    drawn = paired([score + gap for score, gap in zip(theirs, gaps, strict=True)], [*theirs])
    assert exact.test == "McNemar"
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.02)


def test_tasks_weigh_the_same_in_an_average_whatever_their_size() -> None:
    found = paired_average([([1.0] * 10, [0.0] * 10), ([0.5] * 90, [0.5] * 90)])
    assert found.difference == pytest.approx(0.5) and found.num_pairs == 100 and found.test == "sign flips"


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_equal_methods_are_rarely_told_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p_values = [paired(list(rng.random(30)), list(rng.random(30))).p_value for _ in range(8)]
    assert min(p_values) > 1e-4 and max(p_values) > 0.1


def test_the_average_of_one_is_itself_and_of_many_is_tighter() -> None:
    assert average_interval([0.5], [(0.3, 0.6)]) == pytest.approx((0.3, 0.6))
    low, high = average_interval([0.5] * 4, [(0.3, 0.7)] * 4)
    assert (low, high) == pytest.approx((0.4, 0.6))
