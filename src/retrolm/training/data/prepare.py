"""Preparing a pool: everything that training needs from the data, tokenised once, in one small folder."""

from __future__ import annotations

import dataclasses
import json
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .collect import CollectedRow, Collection, collect, is_held_out
from .config import Stage1DataConfig
from .documents import read_documents
from .encoder import TextEncoder, tokenizer_fingerprint
from .mining import Embed
from .pool import DEV, TRAIN, compact_ids, write_pool
from .rows import Passage, RowCounts, content_hash, in_batches
from .sample import Span
from .sentences import sentence_starts, token_span, token_starts

_BATCH_TEXTS = 512
_MIN_BOOK_TOKENS = 2048
_LARGEST_BOOK_CHARS = 400_000


def prepare_pool(
    config: Stage1DataConfig,
    tokenizer: Any,
    out_dir: Path,
    data_root: Path,
    progress: Callable[[str], None] = lambda message: None,
    embed: Embed | None = None,
) -> dict[str, Any]:
    """Read the sources of a config, tokenise them and write a pool folder for `TokenPool`; returns its manifest.

    Args:
        tokenizer: a fast transformers tokenizer; the pool can be used with it alone.
        data_root: what relative paths in the config are relative to.
        progress: called with one line per step.
        embed: mine missing hard negatives with these embeddings (texts -> array [num_texts, dim]) instead of BM25.

    Raises `UserError` for missing or unusable sources. The manifest is written last, so a broken-off run leaves no
    pool behind.
    """
    encoder = TextEncoder(tokenizer)
    progress("reading questions and passages")
    found = collect(config, data_root, embed)
    progress(f"tokenising {len(found.passages)} passages; {len(found.rows)} questions")
    passages = _tokenise_passages(config, encoder, found)
    rows = _row_arrays(found, passages)
    space = config.max_pool_bytes - _bytes(found, passages, rows)
    progress(f"tokenising books into {max(space, 0) / 1e6:.0f} MB")
    books = _tokenise_books(config, encoder, data_root, space, found.counts)
    arrays = {**passages.arrays(), **books.arrays(), **rows}
    tokens = {name: arrays[name] for name in ("passages", "titles", "books")}
    manifest = _manifest(config, tokenizer, found, arrays)
    return write_pool(
        out_dir, {**arrays, **compact_ids(tokens)}, [row.query for row in found.rows], sorted(found.common), manifest
    )


@dataclass
class _PassageTokens:
    """Token arrays of all passages, growing."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    offsets: list[int] = field(default_factory=lambda: [0])
    titles: array[int] = field(default_factory=lambda: array("I"))
    title_offsets: list[int] = field(default_factory=lambda: [0])
    sentences: array[int] = field(default_factory=lambda: array("I"))
    source: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    spans: dict[tuple[int, int], Span] = field(default_factory=dict)
    cuts: dict[int, Span] = field(default_factory=dict)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "passages": np.array(self.tokens, dtype=np.uint32),
            "passage_offsets": np.array(self.offsets, dtype=np.uint32),
            "titles": np.array(self.titles, dtype=np.uint32),
            "title_offsets": np.array(self.title_offsets, dtype=np.uint32),
            "passage_sentences": np.array(self.sentences, dtype=np.uint32),
            "passage_source": np.array(self.source, dtype=np.uint8),
            "passage_split": np.array(self.split, dtype=np.uint8),
        }


def _tokenise_passages(config: Stage1DataConfig, encoder: TextEncoder, found: Collection) -> _PassageTokens:
    out = _PassageTokens()
    names = source_names(found)
    wanted = _wanted_spans(found.rows)
    dev = {index for row in found.rows if row.split == DEV for index in row.positives}
    for batch in in_batches(enumerate(found.passages), _BATCH_TEXTS):
        texts = encoder.encode_batch([passage.text for _, passage in batch])
        titles = encoder.encode_batch([f"{passage.title}\n" if passage.title else "" for _, passage in batch])
        for (index, passage), (ids, spans), (title_ids, _) in zip(batch, texts, titles, strict=True):
            _add_passage(out, index, passage, ids, spans, wanted.get(index, ()), config.max_stored_passage_tokens)
            out.titles.extend(title_ids)
            out.title_offsets.append(len(out.titles))
            out.source.append(names.index(found.passages.sources[index]))
            out.split.append(DEV if index in dev else TRAIN)
    return out


def source_names(found: Collection) -> list[str]:
    """Return the names of all row and passage sources, sorted; arrays hold indices into it."""
    return sorted({row.source for row in found.rows} | set(found.passages.sources))


def _wanted_spans(rows: Sequence[CollectedRow]) -> dict[int, list[tuple[int, int, CollectedRow]]]:
    """Passage -> (row index, place among the row's positives, row) wherever an answer or a cut must be located."""
    wanted: dict[int, list[tuple[int, int, CollectedRow]]] = defaultdict(list)
    for number, row in enumerate(rows):
        if row.answers or row.cut:
            for slot, index in enumerate(row.positives):
                wanted[index].append((number, slot, row))
    return wanted


def _add_passage(
    out: _PassageTokens,
    index: int,
    passage: Passage,
    ids: list[int],
    spans: list[Span],
    wanted: Sequence[tuple[int, int, CollectedRow]],
    longest: int,
) -> None:
    base = out.offsets[-1]
    starts = token_starts(sentence_starts(passage.text), spans[:longest])
    out.sentences.extend(base + start for start in starts)
    out.tokens.extend(ids[:longest])
    out.offsets.append(len(out.tokens))
    for number, slot, row in wanted:
        if row.cut and slot == 0:
            out.cuts[number] = token_span(*row.cut, spans[:longest])
        place = _answer_place(passage.text, row.answers)
        if place:
            out.spans[number, slot] = token_span(*place, spans[:longest])


def _answer_place(text: str, answers: Sequence[str]) -> Span | None:
    lower = text.lower()
    for answer in sorted(answers, key=len, reverse=True):
        start = lower.find(answer.lower()) if len(answer) > 1 else -1
        if start >= 0:
            return start, start + len(answer)
    return None


def _row_arrays(found: Collection, passages: _PassageTokens) -> dict[str, NDArray[Any]]:
    names = source_names(found)
    rows = found.rows
    index_type = np.uint16 if len(found.passages) <= 2**16 else np.uint32
    answers = [
        passages.spans.get((n, slot), (-1, -1)) for n, row in enumerate(rows) for slot in range(len(row.positives))
    ]
    return {
        "row_source": np.array([names.index(row.source) for row in rows], dtype=np.uint8),
        "row_split": np.array([row.split for row in rows], dtype=np.uint8),
        "row_positives": np.array([index for row in rows for index in row.positives], dtype=index_type),
        "row_positive_offsets": _offsets([len(row.positives) for row in rows]),
        "row_answers": np.array(answers, dtype=np.int16).reshape(-1, 2),
        "row_cuts": np.array([passages.cuts.get(n, (-1, -1)) for n in range(len(rows))], np.int16).reshape(-1, 2),
        "row_negatives": np.array([index for row in rows for index in row.negatives], dtype=index_type),
        "row_negative_offsets": _offsets([len(row.negatives) for row in rows]),
    }


def _offsets(lengths: Sequence[int]) -> NDArray[np.uint32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)


def _bytes(found: Collection, passages: _PassageTokens, rows: dict[str, NDArray[Any]]) -> int:
    """Bytes that the pool takes without its books; questions count as if they compressed by half."""
    text = sum(len(row.query.encode()) for row in found.rows) // 2
    tokens = 2 * (len(passages.tokens) + len(passages.titles)) + 4 * len(passages.sentences)
    return text + tokens + sum(array.nbytes for array in rows.values()) + 10 * len(passages.offsets) + 400_000


@dataclass
class _BookTokens:
    """The stream of book tokens, growing."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    offsets: list[int] = field(default_factory=lambda: [0])
    sentences: array[int] = field(default_factory=lambda: array("I"))
    split: list[int] = field(default_factory=list)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "books": np.array(self.tokens, dtype=np.uint32),
            "book_offsets": np.array(self.offsets, dtype=np.uint32),
            "book_split": np.array(self.split, dtype=np.uint8),
            "book_sentences": np.array(self.sentences, dtype=np.uint32),
        }


def _tokenise_books(
    config: Stage1DataConfig, encoder: TextEncoder, data_root: Path, space: int, counts: dict[str, RowCounts]
) -> _BookTokens:
    """Tokenise a stretch of every document, equally long, so that all of them fit the space that is left."""
    out = _BookTokens()
    sources = [source for source in config.sources if source.is_documents]
    num_documents = sum(
        sum(1 for _ in islice(read_documents(data_root / source.path, RowCounts()), source.max_rows))
        for source in sources
    )
    share = int(space / 2.3 / max(1, num_documents))  # 2 bytes a token, and the sentence starts
    for source in sources:
        documents = read_documents(data_root / source.path, counts.setdefault(source.name, RowCounts()))
        for document in islice(documents, source.max_rows):
            _add_book(out, document.text, share, config, encoder)
    return out


def _add_book(out: _BookTokens, text: str, share: int, config: Stage1DataConfig, encoder: TextEncoder) -> None:
    """Add up to `share` tokens from a random place of a document; too short ones are left out."""
    rng = random.Random(f"{config.seed}:{content_hash(text)}")
    chars = min(_LARGEST_BOOK_CHARS, 7 * share)
    start = rng.randrange(max(1, len(text) - chars))
    stretch = text[start : start + chars]
    ids, spans = encoder.encode_spans(stretch)
    begin = token_starts(sentence_starts(stretch), list(spans))[1:2] or [0]
    kept = ids[begin[0] : begin[0] + share]
    if len(kept) < min(_MIN_BOOK_TOKENS, config.min_tokens):
        return
    starts = token_starts(sentence_starts(stretch), list(spans[: begin[0] + len(kept)]))
    base = out.offsets[-1] - begin[0]
    out.sentences.extend(base + token for token in starts if token >= begin[0])
    out.tokens.extend(kept.tolist())
    out.offsets.append(len(out.tokens))
    out.split.append(DEV if is_held_out(content_hash(text), config.dev_fraction) else TRAIN)


def _manifest(
    config: Stage1DataConfig, tokenizer: Any, found: Collection, arrays: dict[str, NDArray[Any]]
) -> dict[str, Any]:
    names = source_names(found)
    by_split = {name: Counter(row.source for row in found.rows if row.split == split) for name, split in _SPLIT_NAMES}
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "tokenizer_name": str(getattr(tokenizer, "name_or_path", "")).rsplit("/", 1)[-1],
        "source_names": names,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "licences": {source.name: source.licence for source in config.sources},
        "num_passages": len(found.passages),
        "num_passage_tokens": len(arrays["passages"]),
        "num_books": len(arrays["book_offsets"]) - 1,
        "num_book_tokens": len(arrays["books"]),
        "num_questions": {name: dict(sorted(counter.items())) for name, counter in by_split.items()},
        "rows": {name: {"kept": counts.kept, "skipped": dict(counts.skipped)} for name, counts in found.counts.items()},
    }


_SPLIT_NAMES = (("train", TRAIN), ("dev", DEV))
