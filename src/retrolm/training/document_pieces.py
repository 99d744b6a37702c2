"""Documents cut into pieces of token ids, streamed in an order that depends on the seed alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..engine.prompts import PromptFormat, prompt_format
from ..errors import UserError
from .data.documents import read_documents
from .data.hub import read_hub_documents
from .data.rows import Document, RowCounts, content_hash
from .piece_config import PieceDataConfig


def prefix_ids(tokenizer: Any, prefix: str) -> list[int]:
    """What stands before every piece: the chat template's head, or BOS where the tokenizer has one."""
    return list(prompt_format(tokenizer, chat=prefix == "chat").prefix_ids)


def num_prefix_tokens(tokenizer: Any, prefix: str) -> int:
    """Tokens of the prefix that are a page of their own: all of the chat template's head, nothing of plain text."""
    return len(prefix_ids(tokenizer, prefix)) if prefix == "chat" else 0


class PieceStream(IterableDataset[Tensor]):
    """The training pieces: int64 [T] each, from piece `start` on, every `stride`-th.

    Pieces of `interleave` documents are mixed; where the documents end, they are read again in the same order. Piece
    number n is a function of documents and configuration, so a run goes on by leaving out what it has seen.

    Args:
        held_out: content hashes of documents that are never trained on.
    """

    def __init__(
        self,
        config: PieceDataConfig,
        tokenizer: Any,
        data_root: Path,
        start: int = 0,
        stride: int = 1,
        held_out: frozenset[int] = frozenset(),
    ) -> None:
        self._config, self._tokenizer, self._data_root = config, tokenizer, data_root
        self._start, self._stride, self._held_out = start, stride, held_out

    def __iter__(self) -> Iterator[Tensor]:
        for number, piece in enumerate(self._endless()):
            if number >= self._start and (number - self._start) % self._stride == 0:
                yield piece

    def _endless(self) -> Iterator[Tensor]:
        config, chooser = self._config, random.Random(self._config.seed)
        cut = piece_cutter(config, self._tokenizer)
        for _ in range(config.epochs):
            documents = (doc for doc in self._documents() if content_hash(doc.text) not in self._held_out)
            pieces = interleaved(map(cut, documents), config.interleave, chooser)
            empty = True
            for piece in pieces:
                empty = False
                yield piece
            if empty:
                raise UserError(
                    f"No document has {config.min_tokens} tokens that may be trained on. Lower min_tokens, or give "
                    "longer texts."
                )

    def _documents(self) -> Iterator[Document]:
        if self._config.hub:
            return read_hub_documents(self._config.hub, self._config.split, RowCounts())
        return read_documents(self._data_root / self._config.path, RowCounts())


def piece_cutter(config: PieceDataConfig, tokenizer: Any) -> Callable[[Document], list[Tensor]]:
    """A function from a document to its pieces: [prefix | tokens], `max_tokens` long, the last one maybe shorter.

    A document with turns is one piece that ends with them; one longer than a piece is left out.
    """
    form = prompt_format(tokenizer, chat=config.prefix == "chat")
    prefix = list(form.prefix_ids)
    size, least = config.max_tokens - len(prefix), config.min_tokens - len(prefix)

    def cut(document: Document) -> list[Tensor]:
        ids = form.encode(document.text) + turn_ids(form, document.turns)
        if document.turns and len(ids) > size:
            return []
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        return [torch.tensor(prefix + part) for part in parts if len(part) >= max(least, 2)]

    return cut


def turn_ids(form: PromptFormat, turns: Sequence[tuple[str, str]]) -> list[int]:
    """Questions and answers as they stand behind a document that is asked, one after the other."""
    found: list[int] = []
    for number, (question, answer) in enumerate(turns):
        gap = " " if form.tail.endswith(":") else ""
        found += form.question_ids(question, follow_up=number > 0) + form.encode(gap + answer)
    return found


def interleaved(documents: Iterable[list[Tensor]], width: int, chooser: random.Random) -> Iterator[Tensor]:
    """Pieces of `width` documents at a time, the next one's drawn at random; pieces of one document stay in order."""
    waiting = iter(documents)
    open_documents: list[list[Tensor]] = []
    while True:
        while len(open_documents) < width and (pieces := next(waiting, None)) is not None:
            if pieces:
                open_documents.append(pieces)
        if not open_documents:
            return
        chosen = chooser.randrange(len(open_documents))
        yield open_documents[chosen].pop(0)
        if not open_documents[chosen]:
            open_documents.pop(chosen)


def held_out_pieces(config: PieceDataConfig, tokenizer: Any, data_root: Path) -> tuple[list[Tensor], frozenset[int]]:
    """The first pieces of the held-out documents, one of each in turn, and the hashes of all of them."""
    if not config.dev_path:
        return [], frozenset()
    documents = list(read_documents(data_root / config.dev_path, RowCounts()))
    cut = piece_cutter(config, tokenizer)
    cuts = [cut(document) for document in documents]
    ranked = [pieces[turn] for turn in range(max(map(len, cuts))) for pieces in cuts if turn < len(pieces)]
    return ranked[: config.dev_pieces], frozenset(content_hash(document.text) for document in documents)
