"""Tables and plots as files: report.md, report.html, CSV files and PNG pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import UserError
from ..journal import write_whole
from .matrix import Matrix, matrix_table
from .pairs import NOTE as PAIRS_NOTE
from .pairs import pair_rows
from .plots import Plot, all_plots
from .results import Results, load_results
from .table import Table
from .tables import all_tables, overview_table

TEMPLATE = Path(__file__).parent / "page.html.j2"


def write_report(
    folders: Sequence[Path],
    out: Path,
    groups: Mapping[str, tuple[str, ...]] | None = None,
    matrix: Matrix | None = None,
) -> list[Path]:
    """Write the report on the rows of `folders` into `out`; returns the files.

    Args:
        groups: tasks to average over by name, beside the known groups. matrix: one table of all methods, put in front.

    Raises `UserError` for folders without rows, and if plots or templates can't be made for want of a package.
    """
    return write_results(load_results(folders, groups), out, matrix=matrix)


def write_results(results: Results, out: Path, title: str = "Results", matrix: Matrix | None = None) -> list[Path]:
    """Write the report on rows that were read; returns the files. Raises `UserError` as `write_report` does."""
    tables = ([overview_table(results)] if results.cells else []) + all_tables(results)
    tables = ([] if matrix is None else [matrix_table(results, matrix)]) + tables
    plots = all_plots(results)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "report.md": to_markdown(tables, plots, results, title),
        "report.html": to_html(tables, plots, results, title),
        "cells.csv": to_csv(results.cells),
        "pairs.csv": to_csv(pair_rows(results)),
    }
    if results.recall:
        texts["recall.csv"] = to_csv(results.recall)
    for name, text in texts.items():
        write_whole(out / name, text)
    for plot in plots:
        (out / f"{plot.name}.png").write_bytes(plot.png)
    return [out / name for name in texts] + [out / f"{plot.name}.png" for plot in plots]


def to_markdown(tables: Sequence[Table], plots: Sequence[Plot], results: Results, title: str = "Results") -> str:
    """All tables, pictures by file name, and where the figures come from."""
    parts = [f"# {title}", *notes()]
    parts += [f"## {table.title}\n\n{markdown_table(table)}" for table in tables]
    parts += [f"## {plot.title}\n\n![{plot.title}]({plot.name}.png)" for plot in plots]
    parts += ["## Where these figures come from\n\n" + "\n".join(f"- {fact}" for fact in provenance_lines(results))]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown with its note below, without its title."""
    lines = [table.columns, ["---"] + ["---:"] * (len(table.columns) - 1), *table.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return body + (f"\n\n{table.note}" if table.note else "")


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, nested values as key.key columns or JSON."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return found


def notes() -> list[str]:
    """What holds for all tables."""
    return ["Scores times 100, with 95% confidence intervals in brackets.", f"Paired differences: {PAIRS_NOTE}"]


def to_html(tables: Sequence[Table], plots: Sequence[Plot], results: Results, title: str = "Results") -> str:
    """One page that needs no other file."""
    try:
        import jinja2
    except ImportError:
        raise UserError("The HTML report needs jinja2: pip install 'retrolm[evaluation]'.") from None
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pictures = [(plot.title, base64.b64encode(plot.png).decode()) for plot in plots]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        notes=notes(),
        tables=tables,
        plots=pictures,
        facts=provenance_lines(results),
        version=__version__,
    )


def provenance_lines(results: Results) -> list[str]:
    """Commits, hardware, versions and commands behind the rows, each once."""
    rows = [*results.samples, *results.recall]
    failed = sum(row.get("failed", False) for row in rows)
    lines = [f"samples: {len(results.samples)}, of which {failed} broke and are scored 0"]
    for key in ("model", "dtype", "seed", "commit", "hardware", "versions", "command"):
        lines += [f"{key}: {value}" for value in dict.fromkeys(_text(row[key]) for row in rows if key in row)]
    return lines


def _text(value: Any) -> str:
    return ", ".join(f"{key} {_text(v)}" for key, v in value.items()) if isinstance(value, dict) else str(value)
