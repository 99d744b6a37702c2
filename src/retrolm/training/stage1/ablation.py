"""Ablations of stage 1: changes to one recipe, each trained alike and measured on the same held-out questions.

Every result is on the disk before the next run begins; a list that was stopped goes on where it was. Several processes
may share a list, each with runs of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...engine.model import RetroLM
from ...errors import UserError, unknown
from ..checkpoint import load_state
from ..data.config import Stage1DataConfig
from ..data.pool import read_manifest
from ..recipe import build_table, read_tables
from .backbone import load_backbone
from .config import Stage1Recipe, Stage1TrainConfig, load_recipe
from .trainer import Stage1Trainer

RESULTS_FILE = "ablation.jsonl"
TABLE_FILE = "ablation.md"
Row = dict[str, Any]
_STATED = ("recall_pages", "page_size", "dev_samples", "seed")


@dataclass(frozen=True)
class Change:
    """One run of the list.

    Attributes:
        name: unique in the list. choice: what is varied, such as "D13" or "rank".
        train, data: keys of the recipe's tables that are replaced for training.
        untrained: measure the retriever as training would begin, without any step.
    """

    name: str
    choice: str
    train: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    untrained: bool = False


@dataclass(frozen=True)
class AblationList:
    """Changes to one recipe. All runs are measured on the recipe's own data, whatever they were trained on."""

    recipe: Stage1Recipe
    changes: tuple[Change, ...]

    def recipe_of(self, change: Change) -> Stage1Recipe:
        """The recipe with a change made, of the weights only those it names; raises `UserError` for what it refuses."""
        data = {**_fields(self.recipe.data), **_tuples(change.data)}
        data["weights"] = {**self.recipe.data.weights, **change.data.get("weights", {})}
        return Stage1Recipe(
            build_table(Stage1TrainConfig, {**_fields(self.recipe.train), **change.train}, "training option"),
            build_table(Stage1DataConfig, data, "data option"),
        )


def load_ablation(path: Path, overrides: Mapping[str, Any] | None = None) -> AblationList:
    """Read a list: `recipe` (relative to the file), a `[train]` table for all runs, and `[[changes]]`.

    Args:
        overrides: further keys of the `[train]` table for all runs.

    Raises:
        UserError: unreadable file, an unknown key, a name used twice, or a change that the recipe refuses.
    """
    content = read_tables(path)
    for key in content:
        if key not in ("recipe", "train", "changes"):
            raise unknown("key of an ablation list", key, ("recipe", "train", "changes"))
    if not isinstance(content.get("recipe"), str):
        raise UserError(f'{path} names no recipe. Add recipe = "FILE" at its top.')
    recipe = load_recipe(path.parent / content["recipe"], {**content.get("train", {}), **(overrides or {})})
    if not content.get("changes"):
        raise UserError(f"{path} names no change. Add at least one [[changes]].")
    entries = [{"name": "", "choice": "", **entry} for entry in content["changes"]]
    changes = tuple(build_table(Change, entry, "key of a change") for entry in entries)
    names = [change.name for change in changes]
    if "" in names:
        raise UserError(f"{path} has a change without a name. Give every [[changes]] a name.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} has two changes of the name {twice[0]!r}. Rename one.")
    found = AblationList(recipe, changes)
    for change in changes:
        found.recipe_of(change)
    return found


def run_ablation(
    ablation: AblationList,
    pool: Path,
    out: Path,
    facts: Mapping[str, Any],
    *,
    seconds: float | None = None,
    only: Collection[Change] | None = None,
    load: Callable[[Stage1Recipe], RetroLM] = load_backbone,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Train and measure each change that has no result yet; returns all rows of the list there are, in its order.

    Args:
        facts: what every row states besides (commit, versions, hardware, command).
        seconds: stop training each after about so long, whatever steps are left; time before a kill counts.
        only: changes to run, None = all; the table has the others' rows as well, where another process made them.
        load: makes the frozen backbone of a recipe. on_row: called with each row of what is run, old or new.
    """
    out.mkdir(parents=True, exist_ok=True)
    keys = [_key(ablation, change, pool, seconds) for change in ablation.changes]
    for change, key in zip(ablation.changes, keys, strict=True):
        if only is not None and change not in only:
            continue
        row = _rows_by_key(out).get(key)
        if row is None:
            row = {**_train(ablation, change, pool, out, seconds, load), "key": key, **facts}
        _keep(out, row, keys)
        on_row(row)
    found = _rows_by_key(out)
    return [found[key] for key in keys if key in found]


def table_text(rows: Sequence[Row]) -> str:
    """The rows as one Markdown table."""
    head = ["choice", "run", "recall", "best layer", "pages", "page size", "steps", "tokens", "seconds"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *([*_cells(row)] for row in rows)]
    note = "Recall of the evidence on held-out questions, mean over layers, in pages beside those attended anyway."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}\n"


def _cells(row: Row) -> Iterator[str]:
    yield from (row["choice"], row["name"])
    yield from ("–" if row[key] is None else f"{row[key]:.3f}" for key in ("recall", "best_recall"))  # noqa: RUF001
    yield from (str(row[key]) for key in ("recall_pages", "page_size", "steps"))
    yield from (f"{row['tokens']:,}", f"{row['train_s']:.0f}")


def _train(
    ablation: AblationList,
    change: Change,
    pool: Path,
    out: Path,
    seconds: float | None,
    load: Callable[[Stage1Recipe], RetroLM],
) -> Row:
    recipe = ablation.recipe_of(change)
    folder = out / "runs" / _slug(change.name)
    trainer = Stage1Trainer(recipe, load(recipe), pool, folder)
    if not change.untrained:
        state = load_state(folder)
        left = None if seconds is None else max(seconds - (state.seconds if state else 0.0), 1e-6)
        trainer.run(resume=True, stop_after_s=left)
    trainer.recipe = Stage1Recipe(recipe.train, ablation.recipe.data)
    recall = trainer.dev_recall()
    row = {
        "name": change.name,
        "choice": change.choice,
        "changes": {"train": dict(change.train), "data": dict(change.data)},
        "recall": recall["mean"],
        "best_recall": recall["best"],
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "train_s": round(trainer.seconds, 1),
        **{key: getattr(recipe.train, key) for key in _STATED},
    }
    trainer.close()
    trainer.lm.detach()
    return row


def _key(ablation: AblationList, change: Change, pool: Path, seconds: float | None) -> str:
    parts = [ablation.recipe_of(change).decisive(), ablation.recipe.decisive()["data"], change.untrained, seconds]
    parts += [ablation.recipe.train.dev_samples, read_manifest(pool)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _read(out: Path) -> Iterator[Row]:
    """Rows that are whole; a last line that a kill cut off is left out."""
    path = out / RESULTS_FILE
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        if line.endswith(b"\n"):
            yield json.loads(line)


def _rows_by_key(out: Path) -> dict[str, Row]:
    return {row["key"]: row for row in _read(out)}


def _keep(out: Path, row: Row, keys: Sequence[str]) -> None:
    """Write a row, if it is new, and the table of all rows there are; one process at a time."""
    with FileLock(out / ".lock"):
        found = _rows_by_key(out)
        if row["key"] not in found:
            found[row["key"]] = row
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found.values()]
            _write(out / RESULTS_FILE, "".join(lines))
        _write(out / TABLE_FILE, table_text([found[key] for key in keys if key in found]))


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _fields(table: Any) -> dict[str, Any]:
    return {item.name: getattr(table, item.name) for item in dataclasses.fields(table)}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
