"""Settings of the stage-1 data: where texts come from, how samples look and how kinds of samples are mixed.

`stage1_data_config(table)` builds them from the `[data]` table of a TOML recipe; unknown keys are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...config import check_choices
from ...errors import UserError
from ..recipe import check_keys, check_ranges, check_types, read_tables

SYNTHETIC_KINDS = ("facts", "registers", "chains", "quoted", "transcripts", "composed")
PASSAGE_QUERY_KINDS = ("rule_questions", "keywords", "cloze", "sentences")


@dataclass(frozen=True)
class SourceConfig:
    """One file or folder to read.

    Attributes:
        name: how counts, the manifest and (if rows carry no source of their own) the mixture name it.
        path: relative to the data root; for `hub`, the data set's id.
        format: a pair format of `readers`, "documents", or "hub" (FlagEmbedding columns, from the hub).
        drop: names of row sources in it that are left out.
        max_rows: read at most so many rows; `None` = all.
        max_bm25_rank: row source -> keep its questions only if BM25 found the positive at this rank or better
            (leaves out questions that mean nothing without their passage).
        split: split of a hub data set.
        licence: for the manifest and the retriever's card.
    """

    name: str
    path: str
    format: Literal["pooled", "flagembedding", "squad", "dpr", "documents", "hub"]
    drop: tuple[str, ...] = ()
    max_rows: int | None = None
    max_bm25_rank: Mapping[str, int] = field(default_factory=dict)
    split: str = "train"
    licence: str = "not stated"

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(f"max_rows must be at least 1, got {self.max_rows}. Leave it out to read all rows.")

    @property
    def is_documents(self) -> bool:
        """Whether it holds long texts instead of questions."""
        return self.format == "documents"


@dataclass(frozen=True)
class Stage1DataConfig:
    """The data part of a stage-1 recipe. Sizes are in tokens unless a name says otherwise.

    Attributes:
        sources: what to read.
        weights: mixture part -> relative weight. Parts are the sources of question rows, the kinds of questions made
            from passages (`PASSAGE_QUERY_KINDS`) and the synthetic kinds (`SYNTHETIC_KINDS`).
        seed: all samples are a pure function of (seed, index).
        exclude: evaluation files (globs relative to the data root; text, JSON or JSON lines): passages that share 13
            words in a row with them, and questions that equal one of theirs, are left out.
        min_tokens, max_tokens: the texts' lengths, drawn log-uniformly.
        length_group: so many consecutive samples share a length, so that batches are even.
        length_curriculum: over so many first samples the longest length grows from `min_tokens` to `max_tokens`.
        long_share: share of the groups whose length is drawn from `max_tokens` to `long_tokens` instead. There is none
            before the curriculum is over; over as many samples again their longest length grows to `long_tokens`.
        max_passage_tokens: longer passages are cut to a window (around the answer where it is known).
        min_hard_negatives, max_hard_negatives: hard negatives packed beside a question's positive.
        further_questions: at most so many more questions are asked on one text, each read on its own behind it. They
            cost little beside reading the text, and each is a full training example.
        book_padding: share of packed samples that are filled with book prose instead of other passages.
        paper_format: share of samples with the paper's instruction and question format; the others vary.
        titles: share of packed samples whose passages carry their titles.
        max_keys: most facts of one kind planted in a text; registers hold as many as fit.
        dev_fraction: share of passages (by content hash) whose questions are held out.
        mined_negatives: hard negatives mined (by BM25 or an embedder) for rows that have none; 0 = don't.
        passage_queries: questions made of each kind in `PASSAGE_QUERY_KINDS`, at most.
        max_pool_bytes: books are cut so that the pool folder stays under this.
        max_stored_passage_tokens: passages are stored up to this length.
    """

    sources: tuple[SourceConfig, ...]
    weights: Mapping[str, float]
    seed: int = 0
    exclude: tuple[str, ...] = ()
    min_tokens: int = 2048
    max_tokens: int = 16384
    length_group: int = 16
    length_curriculum: int = 0
    long_share: float = 0.0
    long_tokens: int = 0
    max_passage_tokens: int = 384
    min_hard_negatives: int = 4
    max_hard_negatives: int = 16
    further_questions: int = 0
    book_padding: float = 0.25
    paper_format: float = 0.5
    titles: float = 0.5
    max_keys: int = 16
    dev_fraction: float = 0.03
    mined_negatives: int = 16
    passage_queries: int = 20000
    max_pool_bytes: int = 50_000_000
    max_stored_passage_tokens: int = 1024

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("The data section names no source. Add at least one [[data.sources]] table.")
        check_types(self)
        check_ranges(
            self,
            at_least_one=(
                "min_tokens",
                "length_group",
                "max_passage_tokens",
                "max_keys",
                "max_pool_bytes",
                "max_stored_passage_tokens",
            ),
            not_negative=(
                "length_curriculum",
                "min_hard_negatives",
                "further_questions",
                "mined_negatives",
                "passage_queries",
            ),
            inside_unit=(),
            shares=("long_share", "book_padding", "paper_format", "titles", "dev_fraction"),
            positive=(),
        )
        if self.max_tokens < self.min_tokens:
            raise UserError(f"max_tokens={self.max_tokens} is below min_tokens={self.min_tokens}.")
        if self.long_share and self.long_tokens < self.max_tokens:
            raise UserError(f"long_share needs long_tokens of at least {self.max_tokens=}, got {self.long_tokens}.")
        if self.min_hard_negatives > self.max_hard_negatives:
            raise UserError(f"min_hard_negatives={self.min_hard_negatives} exceeds {self.max_hard_negatives=}.")
        if not any(weight > 0 for weight in self.weights.values()) or min(self.weights.values()) < 0:
            raise UserError(f"weights must hold at least one positive and no negative weight, got {self.weights!r}.")

    @property
    def longest(self) -> int:
        """Tokens of the longest texts there are."""
        return self.long_tokens if self.long_share else self.max_tokens


def stage1_data_config(table: Mapping[str, Any]) -> Stage1DataConfig:
    """Build the config from the `[data]` table of a recipe.

    Raises:
        UserError: unknown or missing keys, values of a wrong type or outside their range.
    """
    values = dict(table)
    entries = values.pop("sources", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError("sources must be a list of tables. Write each under a line [[data.sources]].")
    sources = tuple(_build(SourceConfig, entry, "[[data.sources]]") for entry in entries)
    found: Stage1DataConfig = _build(Stage1DataConfig, {"weights": {}, **values, "sources": sources}, "[data]")
    return found


def load_stage1_data_config(path: Path) -> Stage1DataConfig:
    """Read the `[data]` table of a TOML recipe file; raises `UserError` as `stage1_data_config`, or if it has none."""
    return stage1_data_config(read_tables(path, "data")["data"])


def _build(kind: type[Any], values: Mapping[str, Any], place: str) -> Any:
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    check_keys(kind, lists, "data option")  # first: a missing key is often one that is misspelt
    required = {entry.name for entry in dataclasses.fields(kind) if _is_required(entry)}
    if missing := sorted(required - set(values)):
        raise UserError(f"A {place} table lacks: {', '.join(missing)}.")
    return kind(**lists)


def _is_required(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
