"""Query pages to generated tokens: compact cache, transformers' `generate`, optional re-retrieval (D12)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..paging import PageTable
from .chunk import Chunk
from .decode import DecodeProgram, build_cache
from .encoder import Encoder
from .prefill import LayerChoice, QueryCapture


@dataclass
class Query:
    """One question page and what is generated after it.

    Attributes:
        table: pages before it. tokens: ids of the page.
        choices: per layer, what the first query page attended (later ones replace nothing).
    """

    table: PageTable
    tokens: list[int]
    generated: list[int] = field(default_factory=list)
    choices: list[LayerChoice] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    peak_prefill: int = 0
    peak_decode: int = 0
    max_position: int = 0
    cache_bytes: int = 0
    ttft_s: float = 0.0
    tpot_s: float = 0.0


class FirstToken(LogitsProcessor):
    """Notes when the first token's logits are there."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.at:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
            self.at = time.perf_counter()
        return scores


class Generator:
    """Generates behind query pages, several at once."""

    def __init__(self, encoder: Encoder, eos_ids: tuple[int, ...], pad_id: int) -> None:
        self._encoder = encoder
        self._eos_ids = eos_ids
        self._pad_id = pad_id

    def run(self, queries: list[Query], max_new_tokens: int, options: dict[str, Any]) -> list[Tensor]:
        """Fill in what follows each query. Returns the store pages each query now holds (the caller releases them).

        With `retrieve_every` = n, each n generated tokens become a page of their own that retrieves anew; the
        question's pages stay attended.
        """
        every = self._encoder.parts.config.retrieve_every
        if not every or max_new_tokens <= every:
            return self._round(queries, max_new_tokens, options)
        held = [torch.empty(0, dtype=torch.int64) for _ in queries]
        try:
            self._rounds(queries, held, every, max_new_tokens, options)
        except BaseException:
            for own in held:
                self._encoder.parts.store.release(own)
            raise
        return held

    def _rounds(
        self, queries: list[Query], held: list[Tensor], every: int, max_new_tokens: int, options: dict[str, Any]
    ) -> None:
        pinned: list[tuple[int, ...]] = [() for _ in queries]
        still = list(range(len(queries)))
        while still:
            part = [queries[i] for i in still]
            left = max_new_tokens - len(part[0].generated)
            ids = self._round(part, min(every, left), options, [pinned[i] for i in still])
            for i, own in zip(still, ids, strict=True):
                held[i] = torch.cat([held[i], own])
                pinned[i] = pinned[i] or tuple(range(len(queries[i].table), len(queries[i].table) + len(own)))
            still = [i for i in still if self._continues(queries[i], max_new_tokens)]
            for i in still:
                self._turn_page(queries[i], held[i], every)

    def _continues(self, query: Query, max_new_tokens: int) -> bool:
        return len(query.generated) < max_new_tokens and not (query.generated and query.generated[-1] in self._eos_ids)

    def _turn_page(self, query: Query, held: Tensor, every: int) -> None:
        """The query's page becomes past; the tokens generated last become the next query page."""
        size = query.table.page_size
        lengths = [len(query.tokens[i : i + size]) for i in range(0, len(query.tokens), size)]
        query.table = query.table.extended(held[-len(lengths) :], torch.tensor(lengths))
        query.tokens = query.generated[-every:]

    def _round(
        self,
        queries: list[Query],
        num_tokens: int,
        options: dict[str, Any],
        pinned: list[tuple[int, ...]] | None = None,
    ) -> list[Tensor]:
        started = time.perf_counter()
        store, size = self._encoder.parts.store, self._encoder.parts.config.page_size
        ids = [store.reserve(-(-len(query.tokens) // size)) for query in queries]
        try:
            groups = [
                self._encoder.query(query.table, own, query.tokens, pinned[i] if pinned else ())
                for i, (query, own) in enumerate(zip(queries, ids, strict=True))
            ]
            encoded = self._encoder.encode(Chunk(groups, max(len(query.tokens) for query in queries)))
            self._generate(queries, encoded.captures, num_tokens, options, started)
        except BaseException:
            for own in ids:
                store.release(own)
            raise
        return ids

    @torch.no_grad()
    def _generate(
        self,
        queries: list[Query],
        captures: list[QueryCapture],
        num_tokens: int,
        options: dict[str, Any],
        started: float,
    ) -> None:
        backbone = self._encoder.parts.backbone
        cache, starts, mask = build_cache(captures)
        expand = max(int(options.get("num_beams", 1) or 1), int(options.get("num_return_sequences", 1) or 1))
        room = mask.shape[1] - 1
        backbone.require_positions(max(capture.end for capture in captures) + num_tokens + 1)
        if expand > 1:
            cache.batch_repeat_interleave(expand)
        input_ids = torch.full((len(queries), room + 1), self._pad_id)
        for row, query in zip(input_ids, queries, strict=True):
            kept = query.tokens[-(room + 1) :]
            row[-len(kept) :] = torch.tensor(kept)
        first, program = FirstToken(), DecodeProgram(backbone, starts)
        processors = LogitsProcessorList([first, *options.get("logits_processor", [])])
        with self._encoder.attachment.run(program):
            out = backbone.model.generate(
                input_ids=input_ids.to(backbone.device),
                attention_mask=mask.to(backbone.device).long(),
                past_key_values=cache,
                max_new_tokens=num_tokens,
                pad_token_id=self._pad_id,
                **{**options, "logits_processor": processors},
            )
        finished = time.perf_counter()
        sequences = getattr(out, "sequences", out)[:, room + 1 :].tolist()
        per_query = len(sequences) // len(queries)
        for i, (query, capture) in enumerate(zip(queries, captures, strict=True)):
            own = [self._cut(tokens) for tokens in sequences[i * per_query : (i + 1) * per_query]]
            self._record(query, capture, own, program)
            query.cache_bytes = sum(k.nbytes + v.nbytes for k, v in zip(capture.keys, capture.values, strict=True))
            if not query.ttft_s:
                query.ttft_s = first.at - started
            query.tpot_s = (finished - first.at) / max(len(own[0]) - 1, 1)

    @staticmethod
    def _record(query: Query, capture: QueryCapture, sequences: list[list[int]], program: DecodeProgram) -> None:
        query.sequences = [query.generated + tokens for tokens in sequences]
        query.generated = query.sequences[0]
        query.choices = query.choices or capture.choices
        attended = max(choice.attended_tokens for choice in capture.choices)
        query.peak_prefill = max(query.peak_prefill, attended)
        new = max(len(tokens) for tokens in sequences)
        query.peak_decode = max(query.peak_decode, attended + max(new - 1, 0))
        query.max_position = max(query.max_position, capture.end + new - 1)

    def _cut(self, tokens: list[int]) -> list[int]:
        """Drop what `generate` pads behind the end-of-sequence token."""
        for index, token in enumerate(tokens):
            if token in self._eos_ids:
                return tokens[: index + 1]
        return tokens
