"""Tables of page recall: by index, and by layer."""

from __future__ import annotations

from typing import Any

from .results import Results
from .table import MISSING, Table, length_name

Rows = list[dict[str, Any]]


def recall_tables(results: Results) -> list[Table]:
    """For each task and length: recall of every index, then the same by layer."""
    found: dict[tuple[str, str, int | None], Rows] = {}
    for row in results.recall:
        if row["num_samples"]:
            found.setdefault((row["model"], row["task"], row["length"]), []).append(row)
    several = len({model for model, _, _ in found}) > 1
    tables = []
    for (model, task, length), rows in found.items():
        title = f"Page recall, {f'{model}, ' if several else ''}{task}, {length_name(length)}"
        tables.append(_summary(title, rows))
        tables += [_by_layer(title, rows, pages) for pages in dict.fromkeys(row["num_pages"] for row in rows)]
    return tables


def _summary(title: str, rows: Rows) -> Table:
    head = ["", "pages", "recall, mean over layers", "best layer", "questions"]
    shown = [
        [
            row["index"],
            str(row["num_pages"]),
            with_ends(row["recall"], row.get("recall_ci")),
            f"{with_ends(row['best_recall'], row.get('best_recall_ci'))} (layer {row['best_layer']})",
            str(row["num_samples"]),
        ]
        for row in rows
    ]
    note = "Brackets: 95% bootstrap interval over questions. Layers without page scores of their own are left out."
    return Table(title, head, shown, note)


def _by_layer(title: str, rows: Rows, num_pages: int) -> Table:
    same = [row for row in rows if row["num_pages"] == num_pages]
    scoring = same[0].get("scoring_layers")
    num_layers = len(same[0]["layers"])
    head = ["", *(f"{layer}" for layer in range(num_layers))]
    shown = [
        [
            row["index"],
            *(
                MISSING if scoring is not None and layer not in scoring else f"{value:.2f}"
                for layer, value in enumerate(row["layers"])
            ),
        ]
        for row in same
    ]
    return Table(f"{title}: recall in {num_pages} pages by layer", head, shown)


def with_ends(value: float, ends: list[float] | None) -> str:
    """A share with its interval, if it has one."""
    return f"{value:.2f}" if ends is None else f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"
