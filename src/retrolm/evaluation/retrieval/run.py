"""Page recall of several indexes over tasks and lengths, as rows in a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...engine.model import RetroLM
from ...retriever import PageRetriever
from ..journal import read_lines, write_lines
from ..readers import sample_format
from ..rows import digest
from ..runner import SampleSet
from ..variants import retriever_digest
from .cases import retrieval_cases
from .heatmap import draw_heatmap
from .recall import recall_rows
from .scores import ORACLE, score_pages

RECALL_FILE = "recall.jsonl"


def run_recall(
    lm: RetroLM,
    sets: Sequence[SampleSet],
    retrievers: Mapping[str, PageRetriever],
    out: Path,
    facts: dict[str, Any],
    num_heatmaps: int = 0,
    indexes: Sequence[str] = (),
    on_set: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Measure each set once and keep its rows in `out`; sets whose rows are there are not measured again.

    Args:
        facts: what the rows state besides: model, seed and provenance.
        num_heatmaps: questions of each set whose scores are drawn, layer by page.
        indexes: names of training-free page methods.
        on_set: called with the rows of each set.

    Returns all rows of the folder. A set without a single usable question gives one row with `num_samples` 0.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / RECALL_FILE
    rows = list(read_lines(path)) if path.exists() else []
    for part in sets:
        key = digest([[sample.to_json() for sample in part.samples], *_identity(lm, retrievers, indexes, facts)])
        found = [row for row in rows if row["config_hash"] == key]
        if not found:
            found = _measure(lm, part, retrievers, indexes, {**facts, "config_hash": key}, out, num_heatmaps)
            rows += found
            write_lines(path, rows)
        on_set(found)
    return rows


def _identity(
    lm: RetroLM, retrievers: Mapping[str, PageRetriever], indexes: Sequence[str], facts: dict[str, Any]
) -> list[Any]:
    digests = {name: retriever_digest(retriever) for name, retriever in retrievers.items()}
    adapter = [] if lm.adapter is None else [retriever_digest(lm.adapter)]
    config = lm.config
    shape = [facts["model"], lm.backbone.fingerprint(), str(lm.backbone.dtype), config.page_size]
    shape += [value for value in (config.agreement_layers, config.word_weight, config.whole_sentences) if value]
    return [*shape, digests, *indexes, *adapter]


def _measure(
    lm: RetroLM,
    part: SampleSet,
    retrievers: Mapping[str, PageRetriever],
    indexes: Sequence[str],
    facts: dict[str, Any],
    out: Path,
    num_heatmaps: int,
) -> list[dict[str, Any]]:
    lm.format = sample_format(lm, part.samples[0])
    cases, left_out = retrieval_cases(lm, part.samples)
    head = {"task": part.task.name, "length": part.length, "page_size": lm.config.page_size, "left_out": left_out}
    for case in cases[:num_heatmaps]:
        scores = score_pages(lm, case.batch, retrievers)
        shown = {name: scores[name] for name in (ORACLE, *(retrievers or ["untrained_bookmarks"]))}
        name = f"heatmap_{part.task.name.replace('/', '_')}_{part.length or 'natural'}_{case.sample_id}.png"
        draw_heatmap(shown, case.gold, f"{part.task.name}, sample {case.sample_id}", out / name)
    found = recall_rows(lm, cases, retrievers, indexes) or [{"index": None, "num_samples": 0}]
    return [{**head, **row, **facts} for row in found]
