"""The paper's tables with a small model: a preset (TOML) says what each table runs, one journal holds all rows.

Rows that several tables need are answered once, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import UserError, unknown
from ..methods import METHODS
from .adapters import with_adapters
from .answering import Answerer
from .journal import write_whole
from .report.costs import memory_table
from .report.results import Results, load_results
from .report.tables import overview_table
from .report.write import markdown_table, write_results
from .runner import DataOptions, Events, Runner, SampleSet, sample_sets
from .tasks import Tokenizer, expand_tasks
from .variants import Variant, variants_of

ROWS = "rows"
INDEX = "README.md"
Kind = Literal["pages", "tokens", "prune", "rag"]
_TYPES = {"str": (str, "a text"), "int": (int, "a whole number"), "bool": (bool, "true or false")}  # by annotation
_LIST = ((list, tuple), "a list")


@dataclass(frozen=True)
class TablePlan:
    """One table.

    Attributes:
        name: of its folder. title: what it shows.
        tasks: tasks and groups. lengths: tokens, or "natural".
        methods: names. kinds: all registered methods of these kinds as well.
        adapter: also run `methods` under the adapter that the run was given.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    lengths: tuple[int | str, ...]
    methods: tuple[str, ...]
    kinds: tuple[Kind, ...] = ()
    kv_budgets: tuple[int, ...] = (2048,)
    retrievers: tuple[str, ...] = ("auto",)
    num_samples: int = 25
    adapter: bool = False

    def variants(self, adapter: str | None) -> list[Variant]:
        """What is compared. Raises `UserError` for an unknown method."""
        names = [*self.methods, *(name for name in METHODS if METHODS.get(name).kind in self.kinds)]
        found = variants_of(names, self.kv_budgets, self.retrievers)
        if adapter is None or not self.adapter:
            return found
        return found + with_adapters(variants_of(self.methods, self.kv_budgets, self.retrievers), [adapter])

    def missing(self, adapter: str | None) -> Iterator[str]:
        """What this table would show besides, and why it doesn't."""
        if self.adapter and adapter is None:
            yield f"{self.name}: stage 2 needs an adapter (--adapter FOLDER, from `retrolm train stage2`)."


@dataclass(frozen=True)
class Preset:
    """A set of tables for one model.

    Attributes:
        batch_size: samples side by side. chunk_pages, page_size: see `RetroConfig`.
    """

    title: str
    model: str
    tables: tuple[TablePlan, ...]
    page_size: int = 128
    chunk_pages: int = 0
    batch_size: int = 1
    seed: int = 42

    def with_samples(self, num_samples: int) -> Preset:
        """The same with another number of samples per task and length everywhere."""
        tables = tuple(dataclasses.replace(table, num_samples=num_samples) for table in self.tables)
        return dataclasses.replace(self, tables=tables)

    @property
    def largest_budget(self) -> int:
        """Tokens."""
        return max(budget for table in self.tables for budget in table.kv_budgets)


@dataclass(frozen=True)
class PreparedTable:
    """A table whose samples are there."""

    plan: TablePlan
    sets: list[SampleSet]
    variants: list[Variant]

    @property
    def num_cells(self) -> int:
        """Sets times variants."""
        return len(self.sets) * len(self.variants)


def load_preset(path: Path) -> Preset:
    """Read a preset; raises `UserError` for an unreadable file, and for what is unknown or missing in it."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"Can't read the preset {path}: {error}.") from None
    found = content.pop("tables", [])
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise UserError(f"tables of {path} must stand under [[tables]], got {found!r}.")
    tables = tuple(_build(TablePlan, table) for table in found)
    if not tables:
        raise UserError(f"{path} names no table. Add at least one [[tables]].")
    preset: Preset = _build(Preset, {**content, "tables": tables})
    for table in preset.tables:
        _check(table)
    return preset


def prepare(
    preset: Preset, tokenizer: Tokenizer, data: DataOptions, adapter: str | None
) -> tuple[list[PreparedTable], list[str]]:
    """Make all samples before the first answer.

    Returns:
        The tables that can be run, and one line for everything that can't, with how to get what is missing.
    """
    prepared: list[PreparedTable] = []
    not_run: list[str] = []
    for plan in preset.tables:
        options = dataclasses.replace(data, num_samples=plan.num_samples, seed=preset.seed)
        sets: list[SampleSet] = []
        for task in expand_tasks(plan.tasks):
            try:
                sets += sample_sets(tokenizer, [task], [_length(length) for length in plan.lengths], options)
            except UserError as error:
                not_run.append(f"{plan.name}: {task}: {error}")
        not_run += plan.missing(adapter)
        if sets:
            prepared.append(PreparedTable(plan, sets, plan.variants(adapter)))
    return prepared, list(dict.fromkeys(not_run))


def run_tables(
    preset: Preset,
    prepared: Sequence[PreparedTable],
    not_run: Sequence[str],
    answerer: Answerer,
    out: Path,
    events: Events | None = None,
) -> list[dict[str, Any]]:
    """Answer what isn't answered yet and write each table's report as it is complete; returns all cells.

    `out` gets `rows/`, one folder per table and an index (`README.md`).

    Raises:
        UserError: a variant can't be opened, or the folder is in use.
    """
    for table in prepared:
        for variant in table.variants:
            answerer.facts(variant)
    cells: list[dict[str, Any]] = []
    done: list[tuple[TablePlan, Results]] = []
    runner = Runner(answerer, out / ROWS, seed=preset.seed, batch_size=preset.batch_size, events=events)
    for table in prepared:
        own = runner.run(table.sets, table.variants)
        results = load_results([out / ROWS]).only({cell["config_hash"] for cell in own})
        write_results(results, out / table.plan.name, table.plan.title)
        done.append((table.plan, results))
        write_whole(out / INDEX, index_text(preset, done, not_run))
        cells += own
    return cells


def index_text(preset: Preset, done: Sequence[tuple[TablePlan, Results]], not_run: Sequence[str]) -> str:
    """What was run, with each table's scores, memory by length and a link to its report, and what was not."""
    parts = [f"# {preset.title}", "Scores times 100, with 95% confidence intervals in brackets."]
    for plan, results in done:
        memory = memory_table(results)
        parts += [f"## {plan.title}", markdown_table(overview_table(results))]
        parts += [f"{memory.title}:", markdown_table(memory)] if memory.rows else []
        parts.append(f"[Everything]({plan.name}/report.md)")
    if not_run:
        parts.append("## Not run\n\n" + "\n".join(f"- {line}" for line in not_run))
    return "\n\n".join(parts) + "\n"


def _length(length: int | str) -> int | None:
    return None if isinstance(length, str) else length


def _check(table: TablePlan) -> None:
    expand_tasks(table.tasks)
    table.variants(None)
    for kind in table.kinds:
        if kind not in get_args(Kind):
            raise unknown("kind of methods", kind, get_args(Kind))
    for length in table.lengths:
        if length != "natural" and not (isinstance(length, int) and length > 0):
            raise UserError(f"lengths of {table.name} must be whole numbers or 'natural', got {length!r}.")


def _check_type(field: dataclasses.Field[Any], value: Any, kind: type[Any]) -> None:
    wanted, words = _TYPES.get(str(field.type), _LIST)
    if not isinstance(value, wanted) or (isinstance(value, bool) and field.type != "bool"):
        raise UserError(f"{field.name} of a {kind.__name__} must be {words}, got {value!r}.")


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    known = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise unknown(f"key of a {kind.__name__}", key, known)
    needed = [name for name, item in known.items() if item.default is dataclasses.MISSING and name not in values]
    if needed:
        raise UserError(f"A {kind.__name__} lacks {', '.join(needed)}. Add it to the preset.")
    for key, value in values.items():
        _check_type(known[key], value, kind)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
