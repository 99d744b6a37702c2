"""Tables of what answers took: time, attended tokens, memory."""

from __future__ import annotations

from typing import Any

from .results import Column, Results
from .table import MISSING, Table, budget, label, length_name

COSTS = (
    *("prompt tokens", "attended, prompt", "attended, answer", "first token (s)", "per token (ms)", "sample (s)"),
    *("peak GPU memory (GB)", "peak host memory (GB)", "batch"),
)
DEVICE, HOST = "peak_device_bytes", "peak_host_bytes"


def cost_tables(results: Results) -> list[Table]:
    """Memory by length, then all costs of each length."""
    lengths = sorted({cell["length"] for cell in results.cells}, key=lambda n: n or 0)
    tables = [cost_table(results, length) for length in lengths]
    memory = memory_table(results)
    return ([memory] if memory.rows else []) + tables


def cost_table(results: Results, length: int | None) -> Table:
    """Memory and latency at a length: medians over tasks and samples, peaks over all."""
    rows = []
    for column in results.columns():
        good = [cell for cell in cells_at(results, column, length) if cell["ttft_s"] is not None]
        if good:
            rows.append([label(column, results), budget(column), *_costs(good)])
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
        _answering([cell["attended_tokens"] for cell in cells]),
        f"{middle('ttft_s'):.2f}",
        f"{1000 * middle('tpot_s'):.1f}",
        f"{middle('total_s'):.2f}",
        f"{max(cell[DEVICE] for cell in cells) / 1e9:.2f}",
        f"{max(cell[HOST] for cell in cells) / 1e9:.2f}",
        str(max(cell["batch_size"] for cell in cells)),
    ]


def _answering(attended: list[dict[str, int]]) -> str:
    """Most tokens that an answer's token attended; apart, by layers and heads that their method leaves dense."""
    most = f"{max(one['decode'] for one in attended):,}"
    dense = max((one.get(key, 0) for one in attended for key in ("dense_layers", "dense_heads")), default=0)
    return f"{most} (dense parts {dense:,})" if dense else most


def memory_table(results: Results) -> Table:
    """Peak memory by prompt length (the paper's Table 4), where there are two lengths or more."""
    lengths = sorted({cell["length"] for cell in results.cells if cell["length"] is not None})
    kind = memory_kind(results)
    rows = [
        [label(column, results), budget(column), *(_peak(results, column, length, kind) for length in lengths)]
        for column in results.columns()
    ]
    head = ["", "KV budget", *(length_name(length) for length in lengths)]
    return Table(f"Memory: {memory_name(kind)} by prompt length (GB)", head, rows if len(lengths) > 1 else [])


def memory_kind(results: Results) -> str:
    """Which memory is shown: the GPU's, or the host's where no row was measured on a GPU."""
    return DEVICE if any(cell[DEVICE] for cell in results.cells) else HOST


def memory_name(kind: str) -> str:
    """A kind of memory in words."""
    return "peak GPU memory" if kind == DEVICE else "peak host memory (no GPU used)"


def cells_at(results: Results, column: Column, length: int | None) -> list[dict[str, Any]]:
    """All cells of a column at a length."""
    return [c for task in results.all_tasks() if (c := results.cell(column, task, length)) is not None]


def _peak(results: Results, column: Column, length: int, kind: str) -> str:
    peaks = [cell[kind] for cell in cells_at(results, column, length) if cell[kind]]
    return f"{max(peaks) / 1e9:.2f}" if peaks else MISSING
