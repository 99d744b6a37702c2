"""What a training run shows: a bar on a terminal, lines elsewhere, a last word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .screen import ERR, count, note, seconds, size


@contextmanager
def training_progress(num_steps: int, shown: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show a bar on a terminal, a line per row elsewhere, nothing on other processes; yields what takes the rows."""
    if not shown or not ERR.is_terminal:
        yield (lambda row: note(row_text(row))) if shown else (lambda row: None)
        return
    columns = (TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=ERR) as progress:
        task = progress.add_task("", total=num_steps)

        def update(row: dict[str, Any]) -> None:
            if "loss" in row:
                progress.update(task, completed=row["step"], description=_figures(row))
            else:
                progress.console.print(row_text(row), style="dim")

        yield update


def row_text(row: dict[str, Any]) -> str:
    """One line for a row of the log."""
    if "dev_recall" in row:
        found = row["dev_recall"]
        kinds = ", ".join(f"{kind} {_share(mean)}" for kind, mean in found["kinds"].items())
        whole = f"best layer {_share(found['best'])}, agreed with words {_share(found['agreed'])}"
        return f"step {row['step']}: dev recall {_share(found['mean'])} ({whole}; {kinds})"
    if "dev_loss" in row:
        return f"step {row['step']}: held-out loss {'-' if row['dev_loss'] is None else format(row['dev_loss'], '.4f')}"
    return f"step {row['step']}: {_figures(row)}"


def report(trainer: Any, complete: bool, what: str, folder: Path) -> None:
    """Say how far a run came and where `what` lies."""
    done = f"{count(trainer.step)} steps, {count(trainer.tokens)} tokens, {seconds(trainer.seconds)}"
    if complete:
        print(f"Trained: {done}. {what}: {folder}")
    else:
        print(f"Stopped at {done}. Go on with --resume.")


def show_speed(row: dict[str, Any]) -> None:
    """One line for a length of `retrolm train speed` on a recipe of stage 2."""
    parts = [f"{count(row['num_tokens'])} tokens"]
    for kind in ("sparse", "full"):
        memory = f", peak {size(row[kind]['peak_device_bytes'])}" if row[kind]["peak_device_bytes"] else ""
        parts.append(f"{kind} {count(row[kind]['tokens_per_s'])} tokens/s{memory}")
    if row["speed_up"] is not None:
        parts.append(f"{row['speed_up']:.2f} times as fast")
    note(" · ".join(parts))
    for kind in ("sparse", "full"):
        note(f"  one {kind} step: " + " · ".join(_part(name, part) for name, part in row[kind]["parts"].items()))


def _part(name: str, part: dict[str, float]) -> str:
    return f"{name} {1000 * part['seconds']:.0f} ms (host {1000 * part['host_s']:.0f})"


def show_cost(found: dict[str, Any]) -> None:
    """What `retrolm train speed` found on a recipe of stage 1."""
    for name, what in (("training", "training"), ("forward", "forward"), ("forward_again", "forward, same shapes")):
        memory = f", peak {size(found[name]['peak_device_bytes'])}" if found[name]["peak_device_bytes"] else ""
        note(f"{what}: {count(found[name]['tokens_per_s'])} tokens/s{memory}")
    note(f"overhead: {found['overhead']:.0%}, with the same shapes {found['overhead_again']:.0%}")
    spent = ((name.replace("_", " "), part["seconds"] / found["num_batches"]) for name, part in found["parts"].items())
    note("one step: " + " · ".join(f"{name} {1000 * took:.1f} ms" for name, took in spent))


def _figures(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.3f}"]
    if "recall8" in row:
        parts.append(f"recall@8 {_share(row['recall8'])}")
    parts.append(f"{count(row['tokens_per_s'])} tokens/s")
    if row["peak_device_bytes"]:
        parts.append(f"peak {size(row['peak_device_bytes'])}")
    return " · ".join(parts)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
