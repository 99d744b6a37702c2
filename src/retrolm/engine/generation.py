"""Query pages to generated tokens: compact cache, transformers' `generate`, optional re-retrieval (D12)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from ..errors import UserError
from ..paging import PageTable, page_lengths
from .backbone import Backbone
from .chunk import Chunk, PageGroup
from .decode import DecodeProgram, build_cache
from .encoder import Encoder
from .fast_decode import DecodeRequest, fast_decode_of
from .generate_options import GenerateOptions, OneStream
from .prefill import LayerChoice, QueryCapture


@dataclass
class Query:
    """One question page and what is generated after it.

    Attributes:
        table: pages before it. tokens: ids of the page. past: ids of the pages before it, for logits processors.
        choices: per layer, what the first query page attended (later ones replace nothing).
        ended: generation came to an end of its own, not to `max_new_tokens`.
        decode_path: what generated: the engine's own loop, or transformers' `generate` and why.
    """

    table: PageTable
    tokens: list[int]
    past: list[list[int]]
    generated: list[int] = field(default_factory=list)
    choices: list[LayerChoice] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    ended: bool = False
    peak_prefill: int = 0
    peak_decode: int = 0
    max_position: int = 0
    cache_bytes: int = 0
    decode_path: str = ""
    ttft_s: float = 0.0
    tpot_s: float = 0.0

    def last_tokens(self, num_tokens: int) -> list[int]:
        """The last ids up to the end of the query page, `num_tokens` of them or as many as there are."""
        found = self.tokens
        for page in reversed(self.past):
            if len(found) >= num_tokens:
                break
            found = page + found
        return found[max(len(found) - num_tokens, 0) :]


@dataclass(frozen=True)
class Continuation:
    """What was generated behind a round's queries: (tokens, ended) of each sequence, times, and what did it."""

    rows: list[tuple[list[int], bool]]
    first_at: float
    finished_at: float
    path: str


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
        question_pages = len(page_lengths(len(query.tokens), table.page_size))
        own = every if config.strict_budget else 0
        needed = table.sink_tokens + (question_pages + 1) * table.page_size + own
        if config.kv_budget < min(needed, table.num_tokens + len(query.tokens) + max_new_tokens):
            raise UserError(
                f"retrieve_every={every} keeps sink and question attended besides the last {every} tokens, which takes "
                f"kv_budget={needed} here; it is {config.kv_budget}. Raise it, or lower retrieve_every."
            )

    def _turn_page(self, query: Query, held: Tensor, every: int) -> None:
        """The query's page becomes past; the tokens generated last become the next query page."""
        lengths = page_lengths(len(query.tokens), query.table.page_size)
        query.table = query.table.extended(held[-len(lengths) :], torch.tensor(lengths))
        query.past = [*query.past, query.tokens]
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
        store, size = self._encoder.parts.store, self._encoder.parts.config.page_size
        ids = [store.reserve(-(-len(query.tokens) // size)) for query in queries]
        try:
            groups = [
                self._encoder.query(query.table, own, query.tokens, pinned[i] if pinned else ())
                for i, (query, own) in enumerate(zip(queries, ids, strict=True))
            ]
            captures = self._encode(queries, groups)
            self._generate(queries, captures, num_tokens, options, streamer, started)
        except BaseException:
            for own in ids:
                store.release(own)
            raise
        return ids

    def _encode(self, queries: list[Query], groups: list[PageGroup]) -> list[QueryCapture]:
        """Run the query pages through the model."""
        return self._encoder.encode(Chunk(groups, max(len(query.tokens) for query in queries))).captures

    def _generate(
        self,
        queries: list[Query],
        captures: list[QueryCapture],
        num_tokens: int,
        options: GenerateOptions,
        streamer: BaseStreamer | None,
        started: float,
    ) -> None:
        backbone = self._encoder.parts.backbone
        backbone.require_positions(max(capture.end for capture in captures) + num_tokens - 1)
        found = self._fast(queries, captures, num_tokens, options, streamer)
        if found is None:
            found = self._plain(queries, captures, num_tokens, options, streamer)
        per_query = len(found.rows) // len(queries)
        for i, (query, capture) in enumerate(zip(queries, captures, strict=True)):
            own = found.rows[i * per_query : (i + 1) * per_query]
            _record(query, capture, own, backbone)
            query.decode_path = found.path
            query.ttft_s = query.ttft_s or found.first_at - started
            query.tpot_s = (found.finished_at - found.first_at) / max(len(own[0][0]) - 1, 1)

    def _fast(
        self,
        queries: list[Query],
        captures: list[QueryCapture],
        num_tokens: int,
        options: GenerateOptions,
        streamer: BaseStreamer | None,
    ) -> Continuation | None:
        """The engine's own loop, where it applies and is wanted."""
        fast = fast_decode_of(self._encoder.attachment, self._encoder.parts.backbone)
        if options.decoding == "plain" or (options.decoding == "auto" and not fast.pays()):
            return None
        decoded = None
        if (options.loop_obstacle() or fast.obstacle()) is None:
            request = DecodeRequest(
                captures,
                [query.tokens[-1] for query in queries],
                num_tokens,
                options.token_choice(),
                options.num_return_sequences,
                options.stopped,
                streamer,
                None if streamer is None else _prompt(queries, captures, options.pad_id),
            )
            decoded = fast.run(self._encoder.attachment, request)
        if decoded is None and options.decoding == "fast":
            raise UserError(f"decoding='fast' can't be had here: {self._obstacle(options)}. Use decoding='auto'.")
        if decoded is None:
            return None
        rows = [ended(row, options.eos_ids, decoded.stopped_at) for row in decoded.rows]
        return Continuation(rows, decoded.first_at, decoded.finished_at, decoded.path)

    def _obstacle(self, options: GenerateOptions) -> str | None:
        fast = fast_decode_of(self._encoder.attachment, self._encoder.parts.backbone)
        return options.loop_obstacle() or fast.obstacle()

    @torch.no_grad()
    def _plain(
        self,
        queries: list[Query],
        captures: list[QueryCapture],
        num_tokens: int,
        options: GenerateOptions,
        streamer: BaseStreamer | None,
    ) -> Continuation:
        """Transformers' `generate`, with all its features."""
        backbone = self._encoder.parts.backbone
        ends = [capture.end for capture in captures]
        cache, starts, mask = build_cache(captures, backbone.cache_room(max(ends) - 1, num_tokens))
        if options.num_sequences > 1:
            cache.batch_repeat_interleave(options.num_sequences)
        input_ids = _input_ids(queries, ends, mask.shape[1], options.pad_id)
        first, program = FirstToken(), DecodeProgram(backbone, starts)
        call = options.call(num_tokens, first, streamer)
        with self._encoder.attachment.run(program):
            out = backbone.model.generate(
                input_ids=input_ids.to(backbone.device),
                attention_mask=mask.to(backbone.device).long(),
                past_key_values=cache,
                **call.arguments,
            )
        rows = out[:, mask.shape[1] :].tolist()
        finished = time.perf_counter()
        stops = [max(at - mask.shape[1], 0) for at in call.stop.lengths]
        stops = stops if stops and options.keeps_rows else [0] * len(rows)
        found = [ended(row, options.eos_ids, stop) for row, stop in zip(rows, stops, strict=True)]
        reason = self._obstacle(options)
        return Continuation(found, first.at, finished, "generate" + (f" ({reason})" if reason else ""))


def _prompt(queries: list[Query], captures: list[QueryCapture], pad_id: int) -> Tensor:
    ends = [capture.end for capture in captures]
    return _input_ids(queries, ends, max(ends), pad_id)


def _input_ids(queries: list[Query], ends: list[int], width: int, pad_id: int) -> Tensor:
    """Ids [B, width] that stand for the cache where logits processors look at the prompt: the latest tokens."""
    input_ids = torch.full((len(queries), width), pad_id)
    for row, query, end in zip(input_ids, queries, ends, strict=True):
        tokens = query.last_tokens(end)
        row[width - len(tokens) :] = torch.tensor(tokens)
    return input_ids


def ended(tokens: list[int], eos_ids: tuple[int, ...], stop: int) -> tuple[list[int], bool]:
    """Drop what `generate` pads behind the end of a sequence; `stop` is where a criterion held, or 0."""
    ends = [index + 1 for index, token in enumerate(tokens) if token in eos_ids][:1] + ([stop] if stop else [])
    return (tokens[: min(ends)], True) if ends else (tokens, False)


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
