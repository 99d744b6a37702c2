"""What the evaluation commands share: options, and how they are read."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import RetroConfig
from ..errors import UserError
from .options import DEFAULT_MODEL, EngineOptions
from .screen import note

if TYPE_CHECKING:
    from ..evaluation.runner import DataOptions, SampleSet

MAX_LENGTH = 100_000_000  # tokens; a longer prompt is a slip of the hand, and would be made for hours before anyone saw
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
SetOption = Annotated[
    list[str],
    typer.Option("--set", help="Any other option of RetroConfig as key=value, or of a method as METHOD.knob=value."),
]
BudgetOption = Annotated[
    list[str], typer.Option("--kv-budget", help="Tokens per layer, parted by commas (1024,2048); may be repeated.")
]
AdapterOption = Annotated[
    list[str],
    typer.Option("--adapter", help="LoRA adapter (stage 2): a folder, a shipped one, auto, or none; may be repeated."),
]


@dataclass(frozen=True)
class SetOptions:
    """Which samples; the fields are options of every evaluation command."""

    task: Annotated[
        list[str], typer.Option("--task", help="Task or group (ruler-needles, longbench-qa6, …); may be repeated.")
    ] = field(default_factory=list)
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, parted by commas (4096,8192), or natural.")
    ] = "natural"
    num_samples: Annotated[int | None, typer.Option(help="Samples per task and length.", min=1, show_default="all")] = (
        None
    )
    seed: SeedOption = 42
    data_dir: Annotated[Path | None, typer.Option(help="Folder with data sets, or hub.", show_default="none")] = None
    task_option: Annotated[
        list[str], typer.Option("--task-option", help="Option of tasks, as key=value (essays=FOLDER); may be repeated.")
    ] = field(default_factory=list)
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder that keeps generated samples.", show_default="none")
    ] = None

    def make(self, tokenizer: Any) -> list[SampleSet]:
        """Make all samples before the first answer, so that missing data is known at once."""
        from ..evaluation.runner import sample_sets

        sets = []
        for part in sample_sets(tokenizer, self.names(), self.sizes(), self.data()):
            sets.append(part)
            note(f"{part.task.name} · {part.length or 'natural'}: {len(part.samples)} samples")
        return sets

    def check(self) -> None:
        """Refuse unknown names and values before a model is loaded; raises `UserError`."""
        if not self.task:
            raise UserError("Name what to run with --task; for example: --task ruler-needles.")
        self.names(), self.sizes(), self.data()

    def names(self) -> list[str]:
        """Full names of the tasks."""
        from ..evaluation.tasks import expand_tasks

        return expand_tasks(self.task)

    def sizes(self) -> list[int | None]:
        """Lengths in tokens, None for natural ones."""
        return parse_lengths(self.lengths)

    def data(self) -> DataOptions:
        """Where samples come from."""
        from ..evaluation.runner import DataOptions

        options = parse_task_options(self.task_option)
        return DataOptions(self.num_samples, self.seed, self.data_dir, self.cache_dir, options)


@dataclass(frozen=True)
class BackboneOptions:
    """Which model with which retrievers; the fields are options of every evaluation command."""

    model: Annotated[str, typer.Option(help="Name of a pulled model, a folder, or a Hugging Face id.")] = DEFAULT_MODEL
    retriever: Annotated[
        list[str],
        typer.Option("--retriever", help="auto, none (untrained), a folder or a shipped name; may be repeated."),
    ] = field(default_factory=lambda: ["auto"])
    page_size: Annotated[
        int | None, typer.Option(help="Tokens per page.", show_default="the retrievers', else 128")
    ] = None
    dtype: Annotated[str, typer.Option(help="Arithmetic of the model: auto, float32, bfloat16, float16.")] = "auto"

    @property
    def label(self) -> str:
        """How the model is called in the rows: the last part of a folder's path, else its name."""
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    def engine(self, **options: Any) -> EngineOptions:
        """Options to load the bare model with; retrievers are attached later."""
        return EngineOptions(
            model=self.model, retriever="none", page_size=self.tokens_per_page, dtype=self.dtype, **options
        )

    @property
    def tokens_per_page(self) -> int:
        """Tokens per page: as given, else those that all named retrievers were trained with.

        Raises `UserError` if they were trained with different ones, or one of them isn't there.
        """
        if self.page_size is not None:
            return self.page_size
        from ..engine.shipped import SHIPPED, resolve_retriever
        from ..retriever import read_card

        names = [self.label if name == "auto" and (SHIPPED / self.label).is_dir() else name for name in self.retriever]
        sizes = {read_card(resolve_retriever(name)).page_size for name in names if name not in ("auto", "none")}
        if len(sizes) > 1:
            raise UserError(
                f"The retrievers were trained with pages of {' and '.join(map(str, sorted(sizes)))} tokens. Choose one "
                "size for all with --page-size."
            )
        return sizes.pop() if sizes else RetroConfig().page_size


def parse_lengths(text: str) -> list[int | None]:
    """Lengths in tokens, in the order given; None for "natural". Raises `UserError` for anything else."""
    found: list[int | None] = []
    for part in text.replace("_", "").split(","):
        word = part.strip()
        if word != "natural" and not (word.isdecimal() and 0 < int(word) <= MAX_LENGTH):
            raise UserError(
                f"--lengths must be whole numbers from 1 to {MAX_LENGTH} parted by commas, or natural, got {part!r}."
            )
        found.append(None if word == "natural" else int(word))
    return found


def parse_budgets(texts: list[str]) -> list[int]:
    """Budgets in tokens, each once, in the order given. Raises `UserError` for anything that is no whole number."""
    found = []
    for part in ",".join(texts).replace("_", "").split(","):
        if not part.strip().isdecimal():
            raise UserError(f"--kv-budget must be whole numbers parted by commas, got {part.strip()!r}.")
        found.append(int(part))
    return list(dict.fromkeys(found))


def run_provenance() -> dict[str, Any]:
    """Facts of this run that every row states."""
    from ..engine.provenance import provenance

    return provenance(["retrolm", *sys.argv[1:]])


def parse_task_options(pairs: list[str]) -> dict[str, Any]:
    """Turn ["key=value", …] into options of tasks; true and false become booleans. Raises `UserError`."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--task-option needs key=value, got {pair!r}. For example: --task-option essays=books")
        found[key] = {"true": True, "false": False}.get(value, value)
    return found
