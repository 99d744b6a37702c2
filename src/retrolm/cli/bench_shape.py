"""`retrolm bench --shape`: a model shape with random weights, measured part by part; and the recorder it replays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .loading import load_engine, read_source
from .options import EngineOptions
from .output_file import check_writable
from .screen import ERR, count, error_line, note, print_json, seconds, show_table, size, waiting

if TYPE_CHECKING:
    from ..engine.shape_bench import Row, ShapePlan

COLUMNS = ("tokens", "what", "batch", "prefill tokens/s", "ms per token", "peak reserved", "note")
_PANEL = "Shapes with random weights"
_HOST_TIER_GB = 1.0


def _option(*names: str, help: str, default: Any = "none") -> Any:
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=_PANEL)


@dataclass(frozen=True)
class ShapeOptions:
    """What is measured of a shape, and recorded for it."""

    shape: Annotated[
        str | None, _option(help="Measure a shape: a name under configs/shapes, or a JSON file of a model's config.")
    ] = None
    selections: Annotated[
        Path | None, _option(help="Recorded page selections to replay.", default="any page as likely as another")
    ] = None
    measure: Annotated[str, _option(help="What to measure, parted by commas.", default="all")] = "all"
    batches: Annotated[str, _option(help="Batch sizes of decoding, parted by commas.", default=True)] = "1"
    plot: Annotated[Path | None, _option(help="Draw the figures into this .png file.")] = None
    record_selections: Annotated[
        Path | None, _option(help="Read --file with --model and write what its retriever selects to this .npz file.")
    ] = None

    def check(self) -> None:
        """Refuse what can be refused before any work; raises `UserError`."""
        if self.shape is None:
            for name in ("selections", "plot"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} belongs to --shape. Name a shape, or leave it out.")
        check_writable(self.plot)
        check_writable(self.record_selections)
        self.batch_sizes()

    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes; raises `UserError` for what is none."""
        try:
            found = tuple(int(part) for part in self.batches.split(","))
        except ValueError:
            raise UserError(f"--batches must be whole numbers parted by commas, got {self.batches!r}.") from None
        if min(found) < 1:
            raise UserError(f"--batches must be at least 1, got {min(found)}.")
        return found


def bench_shape(
    engine: EngineOptions,
    options: ShapeOptions,
    sizes: list[int],
    dense_limit: int | None,
    verify_tokens: int,
    output: Path | None,
    as_json: bool,
) -> int:
    """Measure a shape; the exit code is 1, and no speed-up is shown, if RetroLM isn't the stock model there."""
    import torch

    from ..engine.provenance import provenance
    from ..engine.random_model import load_shape, random_model
    from ..engine.shape_bench import RETRIEVER_RANK, RowFile, ShapeBench, check_shape

    shape = load_shape(str(options.shape))
    plan = _plan(engine, options, sizes, dense_limit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(engine, device.type)
    with waiting("Checking that RetroLM equals the stock model in a few layers of this shape …"):
        checks = check_shape(shape, plan.config, dtype, device, verify_tokens)
    passed = all(check.passed for check in checks)
    head = {
        "shape": options.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "selections": "uniform" if options.selections is None else options.selections.name,
        "config": asdict(plan.config),
        "retriever_rank": RETRIEVER_RANK,
        "host_tier_device_kv_bytes": plan.host_kv_bytes,
        **provenance(["retrolm", *sys.argv[1:]]),
        "equal_to_stock": {"passed": passed, "checks": [asdict(check) for check in checks]},
    }
    file = RowFile(output, head)
    with waiting("Making random weights …"):
        model = random_model(shape, dtype, device)
    rows: list[Row] = []
    with ERR.status("Warming up …") as status:
        for row in ShapeBench(model, plan).run(status.update):
            rows.append(row)
            file.add(row.plain())
    _report(head, rows, passed, options.plot, as_json)
    return 0 if passed else 1


def _plan(engine: EngineOptions, options: ShapeOptions, sizes: list[int], dense_limit: int | None) -> ShapePlan:
    from ..engine.selections import load_selections
    from ..engine.shape_bench import MEASUREMENTS, ShapePlan

    config = engine.config()
    names = MEASUREMENTS if options.measure == "all" else tuple(options.measure.split(","))
    return ShapePlan(
        lengths=tuple(sizes),
        config=config.replace(device_kv_bytes=None),
        measurements=names,
        batches=options.batch_sizes(),
        host_kv_bytes=config.device_kv_bytes or int(_HOST_TIER_GB * 1e9),
        num_generated=engine.max_new_tokens,
        dense_limit=dense_limit,
        recorded_LPS=None if options.selections is None else load_selections(options.selections),
    )


def _dtype(engine: EngineOptions, device: str) -> Any:
    import torch

    name = engine.dtype if engine.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return getattr(torch, name)


def _report(head: dict[str, Any], rows: Sequence[Row], passed: bool, plot: Path | None, as_json: bool) -> None:
    from ..engine.shape_bench import speed_ups

    found = speed_ups(list(rows)) if passed else {}
    if plot is not None:
        from .bench_plot import draw_rows

        draw_rows(rows, f"{head['shape']}, {head['dtype']}", plot)
    if as_json:
        print_json({**head, "rows": [row.plain() for row in rows], "speed_ups": found})
        return
    title = f"{head['shape']}, {head['dtype']}, budget {count(head['config']['kv_budget'])}"
    show_table(COLUMNS, [_cells(row) for row in rows], title=title, right=(0, 2, 3, 4, 5))
    for num_tokens, entry in found.items():
        parts = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in entry.items()]
        note(f"{count(num_tokens)} tokens, times the stock model: {', '.join(parts)}") if parts else None
    if not passed:
        error_line("No speed-up is shown, since RetroLM doesn't equal the stock model in a few layers of this shape.")


def _cells(row: Row) -> tuple[str, ...]:
    figures = row.figures
    speed = count(figures["tokens_per_s"]) if "seconds" in figures else ""
    pace = f"{figures['s_per_token'] * 1e3:.2f}" if "s_per_token" in figures else ""
    peak = size(figures["peak_reserved_bytes"]) if "peak_reserved_bytes" in figures else ""
    remark = row.error or figures.get("decode_path", "")
    if "hit_rate" in figures:
        remark += f"; hits {figures['hit_rate']:.0%}, request {seconds(figures['request_s'])}"
    return (count(row.num_tokens), row.what, str(row.batch), speed, pace, peak, remark)


def record_selections(engine: EngineOptions, target: Path, file: str | None) -> int:
    """Read a text and write which pages the retriever ranks first, by layer and page."""
    if file is None:
        raise UserError("--record-selections reads a text. Name it with --file.")
    text = read_source(file)
    lm = load_engine(engine)
    from ..engine.selections import save_selections
    from ..engine.shape_bench import recorded_selections

    with waiting("Reading …"):
        found = recorded_selections(lm, text)
    about = {"model": engine.model, "retriever": lm.retriever_name, "kv_budget": lm.config.kv_budget}
    save_selections(target, found, {**about, "page_size": lm.config.page_size})
    note(f"Wrote the selections of {found.shape[1]} pages in {found.shape[0]} layers to {target}.")
    return 0
