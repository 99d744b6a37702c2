"""`retrolm bench`: time RetroLM against dense attention by the stock model."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .bench_shape import ShapeOptions, bench_shape, record_selections
from .loading import load_engine, read_source, require_pages
from .options import EngineOptions, JsonFlag, with_options
from .output_file import check_writable, write_whole
from .screen import ERR, count, error_line, note, print_json, seconds, show_table, size, waiting
from .verify import show_verification

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.model import RetroLM
    from ..engine.verify import Verification

COLUMNS = ("tokens", "", "prefill tokens/s", "read + answer", "peak memory", "speed-up")


@with_options(engine=EngineOptions(max_new_tokens=32), shape=ShapeOptions())
def command(
    engine: EngineOptions,
    shape: ShapeOptions,
    lengths: Annotated[str, typer.Option(help="Text lengths in tokens, parted by commas.")] = "8192,32768",
    repeats: Annotated[int, typer.Option(help="Pairs of runs per length; medians are shown.", min=1)] = 3,
    file: Annotated[str | None, typer.Option(help="Text to read.", show_default="random tokens")] = None,
    dense_limit: Annotated[
        int | None, typer.Option(help="Don't run the stock model on longer texts.", show_default="no limit", min=0)
    ] = None,
    verify_tokens: Annotated[int, typer.Option(help="Tokens of the equality check that comes first.", min=1)] = 999,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also say which operators take the time of reading the shortest text.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this file, as JSON.")] = None,
    as_json: JsonFlag = False,
) -> int:
    """Time reading a text and answering a question: RetroLM and the stock model in interleaved pairs, in one process.

    First an equality check runs; if it fails no speed-up is shown, and the exit code is 1. Beyond the model's
    window the stock model's answers mean nothing, but its time does. Peak memory: tensors on a GPU, the whole process
    on a CPU.

    With --shape a model of that shape with random weights is measured, part by part: see docs/speed.md. With
    --record-selections the pages that a trained retriever chooses are recorded for that.
    """
    engine.check()
    require_pages(engine, "bench")
    shape.check()
    sizes = _lengths(lengths)
    check_writable(output)
    if shape.record_selections is not None:
        return record_selections(engine, shape.record_selections, file)
    if shape.shape is not None:
        return bench_shape(engine, shape, sizes, dense_limit, verify_tokens, output, as_json)
    text = None if file is None else read_source(file)
    lm = load_engine(engine)
    ids = _texts(lm, sizes, text)
    verification = _verified(lm, verify_tokens)
    report: dict[str, Any] = _head(lm, engine, verification)
    if verification.passed:
        report["rows"] = _run(lm, ids, repeats, engine.max_new_tokens, dense_limit)
        if profile:
            report["operator_shares"] = _shares(lm, min(ids, key=len))
    if output is not None:
        write_whole(output, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if as_json:
        print_json(report)
    elif verification.passed:
        _show(report)
    if not verification.passed:
        _refuse(verification, as_json)
    return 0 if verification.passed else 1


def _lengths(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.replace("_", "").split(",")]
    except ValueError:
        raise UserError(f"--lengths must be whole numbers parted by commas, got {text!r}.") from None
    if min(found) < 1:
        raise UserError(f"--lengths must be at least 1 token, got {min(found)}.")
    return found


def _texts(lm: RetroLM, sizes: list[int], text: str | None) -> list[Tensor]:
    from ..engine.bench import synthetic_ids
    from ..engine.verify import text_ids

    return [synthetic_ids(lm, length) if text is None else text_ids(lm, text, length) for length in sizes]


def _verified(lm: RetroLM, num_tokens: int) -> Verification:
    from ..engine.verify import own_source_ids, verify

    with waiting("Checking that RetroLM equals the stock model …"):
        return verify(lm, own_source_ids(lm, num_tokens))


def _head(lm: RetroLM, engine: EngineOptions, verification: Verification) -> dict[str, Any]:
    from ..engine.provenance import provenance

    return {
        "model": engine.model,
        "dtype": str(lm.backbone.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "window": lm.backbone.window,
        "method": lm.method.name,
        "retriever": lm.retriever_name,
        "config": asdict(lm.config),
        **provenance(["retrolm", *sys.argv[1:]]),
        "equal_to_stock": {"passed": verification.passed, **asdict(verification)},
        "rows": [],
    }


def _run(
    lm: RetroLM, texts: list[Tensor], repeats: int, num_generated: int, dense_limit: int | None
) -> list[dict[str, Any]]:
    from ..engine.bench import Bench, bench_row

    bench, rows = Bench(lm, num_generated), []
    with ERR.status("Warming up …") as status:
        bench.warm_up(min(min(map(len, texts)), lm.config.page_size))
        for ids in texts:
            with_dense = dense_limit is None or len(ids) <= dense_limit
            rows.append(bench_row(bench.compare(ids, repeats, with_dense, lambda step: status.update(step))))
    return rows


def _shares(lm: RetroLM, ids: Tensor) -> dict[str, Any]:
    from ..engine.operator_shares import operator_shares

    with waiting("Profiling …"):
        return asdict(operator_shares(lm, ids))


def _show_shares(shares: dict[str, Any]) -> None:
    rooms = {"products": "matrix products", "attention": "attention", "stock": "rest of the stock layers", "own": "own"}
    rows = [(label, f"{shares[room]:.1%}") for room, label in rooms.items()]
    rows += [(f"  {name}", f"{share:.1%}") for name, share in shares["largest_own"].items()]
    show_table(
        ("operators", "share"), rows, title=f"Reading {count(shares['num_tokens'])} tokens, profiled", right=(1,)
    )
    note("The profiler slows small operators most, so the engine's own share is an upper bound.")


def _show(report: dict[str, Any]) -> None:
    rows = [cells for row in report["rows"] for cells in _cells(row)]
    title = f"{report['model']}, {report['dtype']}, budget {count(report['config']['kv_budget'])}, {report['device']}"
    show_table(COLUMNS, rows, title=title, right=(0, 2, 3, 4, 5))
    check = report["equal_to_stock"]
    largest = max(found["largest"] or 0.0 for found in check["checks"])
    note(f"\nEquality check passed: largest logit difference {largest:.1e}, bar {check['bar']:.1e}.")
    window = report["window"]
    beyond = [count(row["num_tokens"]) for row in report["rows"] if row["num_tokens"] > window]
    if beyond:
        note(f"Beyond the model's window of {count(window)} tokens only dense's time counts: {', '.join(beyond)}.")
    if "operator_shares" in report:
        _show_shares(report["operator_shares"])
    hardware = report["hardware"]
    note(f"{hardware['cpu']}, threads: {hardware['num_threads']}{''.join(', ' + gpu for gpu in hardware['gpus'])}")


def _cells(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """Two lines of the table: ours and dense."""
    speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
    lines: list[tuple[str, ...]] = [(count(row["num_tokens"]), "RetroLM", *_figures(row["ours"]), speedup)]
    if row["dense"] is not None:
        lines.append(("", "dense", *_figures(row["dense"]), ""))
    return lines


def _figures(side: dict[str, Any]) -> tuple[str, str, str]:
    return (count(side["prefill_tokens_per_s"]), seconds(side["total_s"]), size(side["peak_bytes"]))


def _refuse(verification: Verification, as_json: bool) -> None:
    if not as_json:
        show_verification(verification)
    error_line("No speed-up is shown, since RetroLM doesn't equal the stock model here.")
