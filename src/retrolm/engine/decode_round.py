"""One round of generation behind encoded query pages: by the engine's own loop, or by transformers' `generate`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from ..paging import PageTable
from .attachment import Attachment
from .backbone import Backbone
from .cache_argument import cache_argument
from .compact_cache import places_for
from .decode import DecodeProgram, build_cache
from .decode_reading import DecodeRequest
from .fast_decode import Decoded, fast_decode_of
from .generate_options import Call, GenerateOptions
from .page_words import PageWords
from .prefill import LayerChoice, QueryCapture


@dataclass
class Query:
    """One question page and what is generated after it.

    Attributes:
        table: pages before it. tokens: ids of the page. past: ids of the pages before it, for logits processors.
        words: of these pages; needed with `word_weight`.
        choices: per layer, what the first query page attended (later ones replace nothing).
        ended: generation came to an end of its own, not to `max_new_tokens`.
        decode_path: what generated: the engine's own loop, or transformers' `generate` and why.
    """

    table: PageTable
    tokens: list[int]
    past: list[list[int]]
    words: PageWords | None = None
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
class Round:
    """What to generate behind queries.

    Attributes:
        captures: of each query, what its page attended. num_tokens: tokens to generate at most.
        streamer: gets the prompts, then the tokens of each step.
    """

    queries: list[Query]
    captures: list[QueryCapture]
    num_tokens: int
    options: GenerateOptions
    streamer: BaseStreamer | None

    @property
    def ends(self) -> list[int]:
        """Compact position behind each query's last token."""
        return [capture.end for capture in self.captures]

    def input_ids(self, width: int) -> Tensor:
        """Ids [B, width] that stand for the cache where logits processors look at the prompt: the latest tokens."""
        input_ids = torch.full((len(self.queries), width), self.options.pad_id)
        for row, query, end in zip(input_ids, self.queries, self.ends, strict=True):
            tokens = query.last_tokens(end)
            row[width - len(tokens) :] = torch.tensor(tokens)
        return input_ids

    def request(self, width: int) -> DecodeRequest:
        """The same for the engine's own loop; `width` as `generate` would be given the prompts."""
        options, repeats = self.options, self.options.num_return_sequences
        last_tokens = [query.tokens[-1] for query in self.queries]
        wants_ids = self.streamer is not None or options.criteria
        return DecodeRequest(
            rows=len(self.queries) * repeats,
            places=places_for(self.captures, self.num_tokens),
            fill=lambda cache: cache.fill(self.captures, last_tokens, repeats),
            num_tokens=self.num_tokens,
            prompts=self.input_ids(width).repeat_interleave(repeats, 0) if wants_ids else None,
            streamer=self.streamer,
            **options.loop_settings(),
        )


@dataclass(frozen=True)
class Continuation:
    """What was generated behind prompts: (tokens, ended) of each sequence, in how many steps, when, how."""

    rows: list[tuple[list[int], bool]]
    num_steps: int
    first_at: float
    finished_at: float
    path: str

    @property
    def tpot_s(self) -> float:
        """Time of each step behind the first, however early one of the rows ended."""
        return (self.finished_at - self.first_at) / max(self.num_steps - 1, 1)


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


def continue_round(attachment: Attachment, backbone: Backbone, asked: Round) -> Continuation:
    """Generate as the options say: by the engine's own loop where it applies and is wanted, else by `generate`.

    Raises:
        UserError: the engine's own loop is asked for and can't be had.
    """
    backbone.require_positions(max(asked.ends) + asked.num_tokens - 1)
    fast = fast_decode_of(attachment, backbone)
    decoded, path = fast.attempt(attachment, asked.options, lambda: asked.request(_width(backbone, asked)))
    return _by_generate(attachment, backbone, asked, path) if decoded is None else from_loop(decoded, asked.options)


def _width(backbone: Backbone, asked: Round) -> int:
    """Columns of the prompts: one for each place of the cache that `generate` would get, and the token to feed."""
    return backbone.cache_room(max(asked.ends) - 1, asked.num_tokens) + 1


def from_loop(decoded: Decoded, options: GenerateOptions) -> Continuation:
    """What the engine's own loop generated, each row up to its end."""
    rows = [ended(row, options.eos_ids, stop) for row, stop in zip(decoded.rows, decoded.stops, strict=True)]
    return Continuation(rows, decoded.num_steps, decoded.first_at, decoded.finished_at, decoded.path)


@torch.no_grad()
def _by_generate(attachment: Attachment, backbone: Backbone, asked: Round, path: str) -> Continuation:
    """Transformers' `generate`, with all its features."""
    options = asked.options
    width, first = _width(backbone, asked), FirstToken()
    cache, starts, mask = build_cache(asked.captures, width - 1)
    if options.num_sequences > 1:
        cache.batch_repeat_interleave(options.num_sequences)
    call = options.call(asked.num_tokens, first, asked.streamer)
    with attachment.run(DecodeProgram(backbone, starts)):
        out = backbone.model.generate(
            input_ids=asked.input_ids(width).to(backbone.device),
            attention_mask=mask.to(backbone.device).long(),
            **cache_argument(backbone.model, cache),
            **call.arguments,
        )
    return continuation(out, width, call, options, first, path)


def continuation(
    out: Tensor, width: int, call: Call, options: GenerateOptions, first: FirstToken, path: str
) -> Continuation:
    """What one call of `generate` returned behind prompts of `width` tokens; reads the tokens from the device."""
    rows, finished = out[:, width:].tolist(), time.perf_counter()
    stops = call.stop.stops(len(rows), width) if options.keeps_rows else [0] * len(rows)
    found = [ended(row, options.eos_ids, stop) for row, stop in zip(rows, stops, strict=True)]
    return Continuation(found, out.shape[1] - width, first.at, finished, path)


def ended(tokens: list[int], eos_ids: tuple[int, ...], stop: int) -> tuple[list[int], bool]:
    """Drop what `generate` pads behind the end of a sequence; `stop` is where a criterion held, or 0."""
    ends = [index + 1 for index, token in enumerate(tokens) if token in eos_ids][:1] + ([stop] if stop else [])
    return (tokens[: min(ends)], True) if ends else (tokens, False)
