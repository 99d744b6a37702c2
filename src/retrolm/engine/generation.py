"""Generation behind query pages: one round, or a retrieval anew every `retrieve_every` tokens (D12)."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..config import RetroConfig
from ..errors import UserError
from .agreement import encode_questions
from .backbone import Backbone
from .chunk import PageGroup, query_lengths, query_pages
from .decode_round import Query, Round, continue_round
from .encoder import Encoder
from .generate_options import GenerateOptions, OneStream
from .prefill import QueryCapture


class Generator:
    """Generates behind query pages, several at once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def run(self, queries: list[Query], max_new_tokens: int, options: GenerateOptions) -> list[Tensor]:
        """Fill in what follows each query. Returns the store pages each query now holds (the caller releases them).

        With `retrieve_every` = n, each n generated tokens become a page of their own that retrieves anew; the
        question's pages stay attended.

        Raises:
            UserError: `max_new_tokens` under 1, or several sequences per query while retrieving again.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        every = self._encoder.parts.config.retrieve_every
        if not every or max_new_tokens <= every:
            return self._round(queries, max_new_tokens, options, options.streamer)
        if options.num_sequences > 1:
            raise UserError(
                f"retrieve_every={every} generates one sequence per prompt. Leave out num_beams and "
                "num_return_sequences, or set retrieve_every=0."
            )
        for query in queries:
            self._require_room_for_rounds(query, every, max_new_tokens)
        held = [torch.empty(0, dtype=torch.int64) for _ in queries]
        try:
            self._rounds(queries, held, every, max_new_tokens, options)
        except BaseException:
            for own in held:
                self._encoder.parts.store.release(own)
            raise
        return held

    def _rounds(
        self, queries: list[Query], held: list[Tensor], every: int, max_new_tokens: int, options: GenerateOptions
    ) -> None:
        streamer = None if options.streamer is None else OneStream(options.streamer)
        pinned: list[tuple[int, ...]] = [() for _ in queries]
        still = list(range(len(queries)))
        while still:
            part = [queries[i] for i in still]
            left = max_new_tokens - len(part[0].generated)
            ids = self._round(part, min(every, left), options, streamer, [pinned[i] for i in still])
            for i, own in zip(still, ids, strict=True):
                held[i] = torch.cat([held[i], own])
                pinned[i] = pinned[i] or tuple(range(len(queries[i].table), len(queries[i].table) + len(own)))
            still = [i for i in still if not queries[i].ended and len(queries[i].generated) < max_new_tokens]
            for i in still:
                self._turn_page(queries[i], held[i], every)
        if streamer is not None:
            streamer.close()

    def _require_room_for_rounds(self, query: Query, every: int, max_new_tokens: int) -> None:
        """Raise `UserError` if sink, question, one more page and the generated page won't fit the budget together."""
        config, table = self._encoder.parts.config, query.table
        question_pages = len(query_lengths(len(query.tokens), config))
        own = every + config.page_marks if config.strict_budget else 0
        needed = table.sink_tokens + (question_pages + 1) * table.page_size + own
        if config.kv_budget < min(needed, table.num_tokens + len(query.tokens) + max_new_tokens):
            raise UserError(
                f"retrieve_every={every} keeps sink and question attended besides the last {every} tokens, which takes "
                f"kv_budget={needed} here; it is {config.kv_budget}. Raise it, or lower retrieve_every."
            )

    def _turn_page(self, query: Query, held: Tensor, every: int) -> None:
        """The query's page becomes past; the tokens generated last become the next query page."""
        lengths = query_lengths(len(query.tokens), self._encoder.parts.config)
        query.table = query.table.extended(held[-len(lengths) :], torch.tensor(lengths))
        query.past = [*query.past, *query_pages(query.tokens, self._encoder.parts.config)]
        query.tokens = query.generated[-every:]

    def _round(
        self,
        queries: list[Query],
        num_tokens: int,
        options: GenerateOptions,
        streamer: BaseStreamer | None,
        pinned: list[tuple[int, ...]] | None = None,
    ) -> list[Tensor]:
        started = time.perf_counter()
        store, config = self._encoder.parts.store, self._encoder.parts.config
        ids = [store.reserve(len(query_lengths(len(query.tokens), config))) for query in queries]
        try:
            groups = [
                self._encoder.query(query.table, own, query.tokens, pinned[i] if pinned else ())
                for i, (query, own) in enumerate(zip(queries, ids, strict=True))
            ]
            captures = self._encode(queries, groups)
            self._continue(Round(queries, captures, num_tokens, options, streamer), started)
        except BaseException:
            for own in ids:
                store.release(own)
            raise
        return ids

    def _encode(self, queries: list[Query], groups: list[PageGroup]) -> list[QueryCapture]:
        """Run the query pages through the model."""
        return encode_questions(self._encoder, groups, word_matches(queries, groups, self._encoder.parts.config))

    def _continue(self, asked: Round, started: float) -> None:
        """Generate, and note in each query what came of it; the round began at `started`."""
        backbone = self._encoder.parts.backbone
        found = continue_round(self._encoder.attachment, backbone, asked)
        per_query = len(found.rows) // len(asked.queries)
        for i, (query, capture) in enumerate(zip(asked.queries, asked.captures, strict=True)):
            own = found.rows[i * per_query : (i + 1) * per_query]
            _record(query, capture, own, backbone)
            query.decode_path = found.path
            query.ttft_s = query.ttft_s or found.first_at - started
            query.tpot_s = found.tpot_s


def word_matches(queries: list[Query], groups: list[PageGroup], config: RetroConfig) -> list[Tensor | None]:
    """How well the words of each query's past pages match it, float32 [P]; None where that changes nothing."""
    return [
        query.words.matches(query.past, query.tokens)
        if config.word_weight and group.leaves_out and query.words is not None
        else None
        for query, group in zip(queries, groups, strict=True)
    ]


def _record(query: Query, capture: QueryCapture, found: list[tuple[list[int], bool]], backbone: Backbone) -> None:
    query.sequences = [query.generated + tokens for tokens, _ in found]
    query.generated = query.sequences[0]
    query.ended = found[0][1]
    query.choices = query.choices or capture.choices
    attended = max(c.attended_tokens for layer, c in enumerate(capture.choices) if backbone.retrieves(layer))
    query.peak_prefill = max(query.peak_prefill, attended)
    new = max(len(tokens) for tokens, _ in found)
    query.peak_decode = max(query.peak_decode, attended + max(new - 1, 0))
    query.max_position = max(query.max_position, capture.end + new - 1)
    query.cache_bytes = sum(k.nbytes + v.nbytes for k, v in zip(capture.keys, capture.values, strict=True))
