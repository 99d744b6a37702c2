"""First pass of preparing a pool: read all question rows, tell train from dev, find hard negatives, make questions."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UserError, unknown
from .config import PASSAGE_QUERY_KINDS, SYNTHETIC_KINDS, SourceConfig, Stage1DataConfig
from .hub import read_hub_pairs
from .mining import BM25Miner, Embed, EmbeddingMiner, Miner
from .overlap import EvaluationTexts, file_texts
from .passage_queries import common_words, passage_query
from .pool import DEV, TRAIN
from .readers import read_pairs, read_passages
from .rows import PairRow, Passage, RowCounts, content_hash, in_batches
from .sample import Span
from .spool import PassageSpool

_HASH_STEPS = 10_000
_MINING_BATCH = 512


@dataclass
class CollectedRow:
    """One question whose passages are indices into the spool; `cut` is in characters of the first positive."""

    source: str
    split: int
    query: str
    positives: list[int]
    negatives: list[int]
    answers: tuple[str, ...] = ()
    cut: Span | None = None


@dataclass
class Collection:
    """All that the first pass found: passages (on disk), questions, and counts by source."""

    passages: PassageSpool = field(default_factory=PassageSpool)
    rows: list[CollectedRow] = field(default_factory=list)
    counts: dict[str, RowCounts] = field(default_factory=dict)
    common: frozenset[str] = frozenset()


def is_held_out(key: int, fraction: float) -> bool:
    """Whether a content hash falls in the dev split."""
    return key % _HASH_STEPS < fraction * _HASH_STEPS


def collect(config: Stage1DataConfig, data_root: Path, embed: Embed | None = None) -> Collection:
    """Read all pair sources of a config. Raises `UserError` for missing, unreadable or all-bad sources."""
    found = Collection()
    evaluation = EvaluationTexts(text for path in _excluded(config, data_root) for text in file_texts(path))
    for source in config.sources:
        if not source.is_documents:
            counts = found.counts.setdefault(source.name, RowCounts())
            _collect_source(source, config, data_root, evaluation, found, counts)
    _check_weights(config, found.rows)
    found.rows = _without_leaks(found)
    rivals = _answering(found.rows)
    for row in found.rows:
        row.negatives = _others(row.negatives, rivals[content_hash(row.query)])
    found.common = common_words(passage.text for passage in found.passages)
    made = _made_questions(config, found)
    _mine(config, found.passages, [*found.rows, *made], rivals, embed)
    found.rows += [row for row in made if row.negatives]
    return found


def _check_weights(config: Stage1DataConfig, rows: Sequence[CollectedRow]) -> None:
    """Refuse weights of nothing there is, before the slow part; raises `UserError` with the closest name."""
    sources = {source.name for source in config.sources} | {name for source in config.sources for name in source.drop}
    known = sources | {row.source for row in rows} | {*PASSAGE_QUERY_KINDS, *SYNTHETIC_KINDS}
    for name, weight in config.weights.items():
        if weight > 0 and name not in known:
            raise unknown("part of the mixture in [data.weights]", name, known)


def _excluded(config: Stage1DataConfig, data_root: Path) -> list[Path]:
    found = []
    for pattern in config.exclude:
        paths = sorted(data_root.glob(pattern))
        if not paths:
            raise UserError(f"No file matches {pattern!r} under {data_root}, so nothing could be kept out of training.")
        found += paths
    return found


def _collect_source(
    source: SourceConfig,
    config: Stage1DataConfig,
    data_root: Path,
    evaluation: EvaluationTexts,
    found: Collection,
    counts: RowCounts,
) -> None:
    bad: dict[int, bool] = {}
    for row in _rows(source, data_root, counts):
        reason = _unwanted(row, source, evaluation, bad)
        if reason:
            counts.kept -= 1
            counts.skip(reason)
            continue
        found.rows.append(_collected(row, found.passages, config.dev_fraction, bad, evaluation))
        if source.max_rows is not None and counts.kept >= source.max_rows:
            break
    if source.format == "pooled":
        _add_unasked(source, data_root / source.path, evaluation, bad, found.passages)


def _rows(source: SourceConfig, data_root: Path, counts: RowCounts) -> Iterator[PairRow]:
    if source.format == "hub":
        return read_hub_pairs(source.path, source.split, source.name, counts)
    return read_pairs(data_root / source.path, source.format, source.name, counts)


def _unwanted(row: PairRow, source: SourceConfig, evaluation: EvaluationTexts, bad: dict[int, bool]) -> str | None:
    limit = source.max_bm25_rank.get(row.source)
    if row.source in source.drop:
        return f"dropped source {row.source}"
    if limit is not None and (row.bm25_rank is None or row.bm25_rank > limit):
        return "positive not found by BM25"
    if evaluation.has_question(row.query):
        return "question of an evaluation set"
    if any(_is_evaluation(passage, evaluation, bad) for passage in row.positives):
        return "passage of an evaluation set"
    return None


def _is_evaluation(passage: Passage, evaluation: EvaluationTexts, known: dict[int, bool]) -> bool:
    key = content_hash(passage.text)
    if key not in known:
        known[key] = evaluation.shares_passage(passage.text)
    return known[key]


def _collected(
    row: PairRow, passages: PassageSpool, dev_fraction: float, bad: dict[int, bool], evaluation: EvaluationTexts
) -> CollectedRow:
    positives = [passages.add(passage, row.source) for passage in row.positives]
    fair = [passage for passage in row.negatives if not _is_evaluation(passage, evaluation, bad)]
    negatives = [passages.add(passage, row.source) for passage in fair]
    held_out = any(is_held_out(passages.hashes[index], dev_fraction) for index in positives)
    split = DEV if held_out else TRAIN
    return CollectedRow(row.source, split, row.query, positives, _others(negatives, positives), row.answers)


def _others(indices: Sequence[int], without: Container[int]) -> list[int]:
    return [index for index in dict.fromkeys(indices) if index not in without]


def _add_unasked(
    source: SourceConfig, folder: Path, evaluation: EvaluationTexts, bad: dict[int, bool], passages: PassageSpool
) -> None:
    """Add the passages of a pooled folder that no question names: fillers, and subjects of made questions."""
    for name, passage in read_passages(folder, RowCounts()).values():
        if name not in source.drop and not _is_evaluation(passage, evaluation, bad):
            passages.add(passage, name)


def _without_leaks(found: Collection) -> list[CollectedRow]:
    """Drop train questions that the dev split asks too, or whose positives are dev passages."""
    dev = [row for row in found.rows if row.split == DEV]
    questions = {content_hash(row.query) for row in dev}
    passages = {index for row in dev for index in row.positives}
    kept: list[CollectedRow] = []
    for row in found.rows:
        leaks = content_hash(row.query) in questions or not passages.isdisjoint(row.positives)
        if row.split == TRAIN and leaks:
            found.counts.setdefault("split", RowCounts()).skip("train question close to the dev split")
        else:
            kept.append(row)
    return kept


def _answering(rows: Sequence[CollectedRow]) -> dict[int, set[int]]:
    """Question (by hash) -> positives of all rows that ask it: none of them is a fair negative for the others."""
    found: dict[int, set[int]] = defaultdict(set)
    for row in rows:
        found[content_hash(row.query)].update(row.positives)
    return found


def _made_questions(config: Stage1DataConfig, found: Collection) -> list[CollectedRow]:
    """Make questions from passages, as many of each wanted kind as the config allows, evenly over the passages."""
    kinds = [kind for kind in PASSAGE_QUERY_KINDS if config.weights.get(kind, 0) > 0]
    kinds += ["keywords"] if config.weights.get("transcripts", 0) > 0 and "keywords" not in kinds else []
    reserved = {index for row in found.rows if row.split == DEV for index in row.positives}
    made: Counter[str] = Counter()
    rows: list[CollectedRow] = []
    order = list(range(len(found.passages)))
    random.Random(f"{config.seed}:passage queries").shuffle(order)
    for index in order:
        open_kinds = [kind for kind in kinds if made[kind] < config.passage_queries]
        held_out = index in reserved or is_held_out(found.passages.hashes[index], config.dev_fraction)
        for row in _questions_about(index, open_kinds, DEV if held_out else TRAIN, config.seed, found):
            made[row.source] += 1
            rows.append(row)
    return rows


def _questions_about(
    index: int, kinds: Sequence[str], split: int, seed: int, found: Collection
) -> Iterator[CollectedRow]:
    passage = found.passages[index]
    for kind in kinds:
        made = passage_query(kind, passage, found.common, random.Random(f"{seed}:{kind}:{index}"))
        if made:
            yield CollectedRow(kind, split, made.query, [index], [], cut=made.cut)


def _mine(
    config: Stage1DataConfig,
    passages: PassageSpool,
    rows: Sequence[CollectedRow],
    rivals: Mapping[int, set[int]],
    embed: Embed | None,
) -> None:
    """Give rows without hard negatives some, from all passages."""
    bare = [row for row in rows if not row.negatives]
    if not bare or not config.mined_negatives:
        return
    texts = [passage.text for passage in passages]
    miner: Miner = EmbeddingMiner(texts, embed) if embed else BM25Miner(texts)
    for batch in in_batches(bare, _MINING_BATCH):
        mined = miner.mine(
            [row.query for row in batch],
            [rivals.get(content_hash(row.query), set()) | set(row.positives) for row in batch],
            [row.answers for row in batch],
            config.mined_negatives,
        )
        for row, negatives in zip(batch, mined, strict=True):
            row.negatives = negatives
