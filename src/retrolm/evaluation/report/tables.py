"""The report's tables as plain text cells. Scores are shown times 100."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..averages import by_bucket, group_average, mean
from ..readers import FULL
from ..statistics import average_interval, paired_difference
from ..tasks import GROUPS
from .results import Column, Results, column_of, complete_groups

MISSING = "–"  # noqa: RUF001
BEYOND = "*"
BEYOND_NOTE = f"{BEYOND} texts beyond the model's window: the stock model runs, but was not trained for such positions."

COSTS = (
    *("prompt tokens", "attended, prompt", "attended, answer", "first token (s)", "per token (ms)", "sample (s)"),
    *("peak GPU memory (GB)", "peak host memory (GB)", "batch"),
)


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, the others are figures."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def all_tables(results: Results) -> list[Table]:
    """All tables that the rows allow."""
    tables = [table for place in results.places() for table in score_tables(results, *place)]
    tables += [table for place in results.places() if (table := difference_table(results, *place)).rows]
    tables += [
        cost_table(results, length)
        for length in sorted({cell["length"] for cell in results.cells}, key=lambda n: n or 0)
    ]
    return tables + bucket_tables(results) + recall_tables(results)


def score_tables(results: Results, name: str, length: int | None) -> list[Table]:
    """Scores of a family at a length: dense and streaming prefill apart, averages of the complete groups."""
    tasks = results.tasks(name, length)
    groups = complete_groups(tasks)
    blocks = {"dense": "dense prefill", "streaming": "streaming prefill"}
    tables = []
    for prefill, title in blocks.items():
        rows = [
            _score_row(results, column, tasks, groups, length)
            for column in results.columns()
            if column.prefill == prefill and any(results.cell(column, task, length) for task in tasks)
        ]
        if rows:
            head = ["", "KV budget", *(task.split("/")[1] for task in tasks), *(f"average {group}" for group in groups)]
            note = BEYOND_NOTE if any(BEYOND in cell for row in rows for cell in row[2:]) else ""
            tables.append(Table(f"{name}, {length_name(length)}: {title}", head, rows, note))
    return tables


def _score_row(results: Results, column: Column, tasks: list[str], groups: list[str], length: int | None) -> list[str]:
    cells = {task: cell for task in tasks if (cell := results.cell(column, task, length)) is not None}
    shown = [_score(cells[task]) if task in cells else MISSING for task in tasks]
    averages = [_average(cells, group) for group in groups]
    return [_label(column, results), str(column.kv_budget or "all"), *shown, *averages]


def _label(column: Column, results: Results) -> str:
    models = {cell["model"] for cell in results.cells}
    return column.method_name if len(models) == 1 else f"{column.model}: {column.method_name}"


def _score(cell: dict[str, Any]) -> str:
    mark = BEYOND if cell["beyond_window"] else ""
    failed = f", {cell['num_failed']} failed" if cell["num_failed"] else ""
    return f"{with_interval(cell['score'], *cell['score_ci'])}{mark}{failed}"


def _average(cells: dict[str, dict[str, Any]], group: str) -> str:
    members = [cells[task] for task in GROUPS[group] if task in cells]
    if len(members) < len(GROUPS[group]):
        return MISSING
    mark = BEYOND if any(cell["beyond_window"] for cell in members) else ""
    score = group_average({task: cell["score"] for task, cell in cells.items()}, group)
    return with_interval(score, *cells_interval(members)) + mark


def cells_interval(cells: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """95% interval of the mean over cells."""
    return average_interval([cell["score"] for cell in cells], [cell["score_ci"] for cell in cells])


def with_interval(score: float, low: float, high: float) -> str:
    """A score with its 95% interval, times 100."""
    return f"{100 * score:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def length_name(length: int | None) -> str:
    """A length in words."""
    return (
        "natural length"
        if length is None
        else f"{length // 1024}K tokens"
        if length % 1024 == 0
        else f"{length} tokens"
    )


def difference_table(results: Results, name: str, length: int | None) -> Table:
    """Every column against dense attention of the same model, on the samples that both have."""
    tasks = results.tasks(name, length)
    rows = []
    for column in results.columns():
        base = next((c for c in results.columns() if c.method == FULL and c.model == column.model), None)
        if base is None or column == base:
            continue
        ours, theirs = shared_scores(results, column, base, tasks, length)
        if ours:
            found = paired_difference(ours, theirs)
            interval = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
            p_value = "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
            rows.append(
                [_label(column, results), str(column.kv_budget or "all"), str(found.num_pairs), interval, p_value]
            )
    head = ["", "KV budget", "shared samples", "difference to full", "p (paired bootstrap)"]
    return Table(f"{name}, {length_name(length)}: paired difference to dense attention", head, rows)


def shared_scores(
    results: Results, column: Column, base: Column, tasks: Sequence[str], length: int | None
) -> tuple[list[float], list[float]]:
    """Scores of two columns on the samples that both have, over all tasks."""
    ours: list[float] = []
    theirs: list[float] = []
    for task in tasks:
        cells = results.cell(column, task, length), results.cell(base, task, length)
        if cells[0] is not None and cells[1] is not None:
            left, right = results.scores(cells[0]), results.scores(cells[1])
            shared = [sample_id for sample_id in left if sample_id in right]
            ours += [left[sample_id] for sample_id in shared]
            theirs += [right[sample_id] for sample_id in shared]
    return ours, theirs


def cost_table(results: Results, length: int | None) -> Table:
    """Memory and latency at a length: medians over tasks and samples, peaks over all."""
    rows = []
    for column in results.columns():
        cells = [c for task in _tasks(results) if (c := results.cell(column, task, length)) is not None]
        good = [cell for cell in cells if cell["ttft_s"] is not None]
        if good:
            rows.append([_label(column, results), str(column.kv_budget or "all"), *_costs(good)])
    head = ["", "KV budget", *COSTS]
    note = "First token: from the start of reading, for the whole batch. Sample: wall time by batch size."
    return Table(f"Memory and latency, {length_name(length)}", head, rows, note)


def _costs(cells: list[dict[str, Any]]) -> list[str]:
    def middle(name: str) -> float:
        values = sorted(cell[name] for cell in cells)
        return float(values[len(values) // 2])

    return [
        f"{middle('num_tokens'):,.0f}",
        f"{max(cell['attended_tokens']['prefill'] for cell in cells):,}",
        f"{max(cell['attended_tokens']['decode'] for cell in cells):,}",
        f"{middle('ttft_s'):.2f}",
        f"{1000 * middle('tpot_s'):.1f}",
        f"{middle('total_s'):.2f}",
        f"{max(cell['peak_device_bytes'] for cell in cells) / 1e9:.2f}",
        f"{max(cell['peak_host_bytes'] for cell in cells) / 1e9:.2f}",
        str(max(cell["batch_size"] for cell in cells)),
    ]


def _tasks(results: Results) -> list[str]:
    return list(dict.fromkeys(cell["task"] for cell in results.cells))


def bucket_tables(results: Results) -> list[Table]:
    """Scores by length class, for sets whose samples carry one (LongBench-E)."""
    tables = []
    for task in _tasks(results):
        labels = {row["sample_id"]: row["labels"].get("bucket") for row in results.samples if row["task"] == task}
        names = sorted({name for name in labels.values() if name})
        rows = [_bucket_row(results, cell, labels, names) for cell in results.cells if cell["task"] == task]
        if names:
            tables.append(Table(f"{task} by length class (words)", ["", "length", *names], rows))
    return tables


def _bucket_row(results: Results, cell: dict[str, Any], labels: dict[str, str | None], names: list[str]) -> list[str]:
    scores = results.scores(cell)
    found = by_bucket(list(scores.values()), [labels[sample_id] or "" for sample_id in scores])
    return [column_of(cell).name, length_name(cell["length"]), *(str(found.get(name, MISSING)) for name in names)]


def recall_tables(results: Results) -> list[Table]:
    """Page recall by index, one table per task and length."""
    found: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in results.recall:
        if row["num_samples"]:
            found.setdefault((row["task"], row["length"]), []).append(row)
    head = ["", "pages", "recall, mean over layers", "best layer", "questions"]
    return [
        Table(
            f"Page recall, {task}, {length_name(length)}",
            head,
            [
                [
                    r["index"],
                    str(r["num_pages"]),
                    f"{r['recall']:.2f}",
                    f"{r['best_recall']:.2f} (layer {r['best_layer']})",
                    str(r["num_samples"]),
                ]
                for r in rows
            ],
        )
        for (task, length), rows in found.items()
    ]


def overview_table(results: Results) -> Table:
    """Mean over a family's tasks by length, where all columns of a length have the same tasks."""
    places = results.places()
    rows = []
    for column in results.columns():
        shown = [_family_mean(results, column, *place) for place in places]
        rows.append([_label(column, results), column.prefill, str(column.kv_budget or "all"), *shown])
    head = ["", "prefill", "KV budget", *(f"{name} {length_name(length)}" for name, length in places)]
    return Table(
        "Overview: mean over tasks", head, rows, "Unweighted means over all tasks of the family in this report."
    )


def _family_mean(results: Results, column: Column, name: str, length: int | None) -> str:
    cells = [results.cell(column, task, length) for task in results.tasks(name, length)]
    there = [cell for cell in cells if cell is not None]
    if not there or len(there) < len(cells):
        return MISSING
    mark = BEYOND if any(cell["beyond_window"] for cell in there) else ""
    return with_interval(mean(cell["score"] for cell in there), *cells_interval(there)) + mark
