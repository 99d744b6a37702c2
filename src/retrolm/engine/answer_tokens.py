"""Methods that choose token by token: prompts are read and answered on the budget, nothing is kept between them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from ..methods.token_base import RepeatScores, TokenMethod
from .answering import PROGRAMS, Outcome, Prompt, PromptProgram, prompt_answer
from .cache_argument import cache_argument
from .decode_reading import DecodeRequest
from .decode_round import Continuation, FirstToken, continuation, from_loop
from .fast_decode import fast_decode_of
from .generate_options import GenerateOptions
from .paged_cache import PagedCache
from .paged_decode import note_exposure
from .question_reading import read_questions
from .repeat_reading import repeat_scores
from .results import Answer, Timings
from .ring_cache import RingCache
from .stock import left_padded
from .stream_loop import StreamCache, StreamRunners
from .token_cache import counting_cache
from .token_loop import loop_obstacle, runners_of
from .token_stream import TokenStream, generating, read_prompts

if TYPE_CHECKING:
    from .model import RetroLM


@dataclass
class _Batch:
    """Prompts that are answered side by side, and when reading them began and ended (`time.perf_counter()`).

    Attributes:
        cache: that answers were generated over, if it was one of fixed shape.
    """

    stream: TokenStream
    prompts: Sequence[Prompt]
    started: float = 0.0
    read: float = 0.0
    cache: PagedCache | RingCache | None = None

    @property
    def rows(self) -> list[list[int]]:
        """All ids of each prompt."""
        return [prompt.ids for prompt in self.prompts]

    def timings(self, found: Continuation) -> Timings:
        """Of the whole batch."""
        return Timings(self.read - self.started, found.first_at - self.read, found.tpot_s)

    def decode_counts(self, num_steps: int) -> list[list[list[int]]]:
        """Keys attended by each generated token, [layer][step][sample]."""
        if self.cache is None:
            return self.stream.decode_counts()
        return [layer.tally.most_SB[:num_steps].tolist() for layer in self.cache.layers]

    def max_position(self, num_steps: int) -> int:
        """Highest RoPE position that can have been used."""
        most = self.stream.max_position
        return max(most, self.cache.kv_budget + num_steps - 1) if isinstance(self.cache, RingCache) else most

    def kept_bytes(self, num_steps: int) -> list[int]:
        """Bytes of keys and values kept for each sample."""
        if self.cache is None:
            return self.stream.kept_bytes()
        return [self.cache.num_kept(len(ids) - 1 + num_steps) * self.stream.row_bytes for ids in self.rows]


@PROGRAMS.register("tokens")
class TokenProgram(PromptProgram):
    """Chunked prefill and generation by `TokenStream`. The last prompt token is the first step of the answer."""

    def __init__(self, lm: RetroLM) -> None:
        super().__init__(lm)
        self._repeat_scores: RepeatScores | None = None
        self._notes: tuple[str, ...] = ()  # for the next answers

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any) -> list[Answer]:
        checked = GenerateOptions(self.lm.model, options, self.lm.eos_ids, self.lm.pad_id, self.lm.tokenizer)
        if checked.num_sequences > 1:
            raise UserError(f"Method {self.lm.method.name!r} generates one sequence per prompt. Leave out num_beams.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        rows = [prompt.ids for prompt in prompts]
        if not all(rows):
            raise UserError("Nothing to answer: a prompt has no tokens.")
        batch = _Batch(self._stream(len(rows), max(map(len, rows)) + max_new_tokens), prompts)
        found = self._generate(batch, max_new_tokens, checked)
        return self._answers(batch, found)

    def logits(self, input_ids: Tensor) -> Tensor:
        stream = self._stream(1, len(input_ids))
        with self.lm.attachment.run(stream):
            found = read_prompts(self.lm.backbone, stream, [input_ids.tolist()], self.lm.pad_id, logits=True)
        return torch.cat([part[0] for part in found])

    def check_attended(self, answer: Answer, num_tokens: int) -> None:
        """Nothing comes on top of the budget, generated tokens neither."""
        self.lm.method.check_attended(answer.attended_tokens, num_tokens, 1, self.allowed_tokens)

    def _stream(self, num_samples: int, num_tokens: int) -> TokenStream:
        method = self.lm.method
        assert isinstance(method, TokenMethod)
        heads = self._dense_heads(method)
        stream = TokenStream(self.lm.backbone, method, self.lm.config.kv_budget, num_samples, heads)
        stream.require_positions(num_tokens)
        return stream

    def _dense_heads(self, method: TokenMethod) -> Tensor | None:
        """The KV heads that the method leaves dense, bool [L, K]; the model is looked at once."""
        if method.repeat_text is None:
            return None
        if self._repeat_scores is None:
            started = time.perf_counter()
            self._repeat_scores = repeat_scores(self.lm.backbone, self.lm.attachment, method.repeat_text)
            took = time.perf_counter() - started
            self._notes = (
                f"{method.name} looked for its heads first, once for this model: {took:.1f} s, not in the times.",
            )
        return method.dense_heads(self._repeat_scores)

    def _generate(self, batch: _Batch, num_tokens: int, checked: GenerateOptions) -> Continuation:
        """By the engine's own loop where it is wanted and nothing stands against it, else by `generate`."""
        lm, method = self.lm, self.lm.method
        assert isinstance(method, TokenMethod)
        fast, obstacle = fast_decode_of(lm.attachment, lm.backbone), loop_obstacle(lm.backbone, method)
        decoded, path = fast.attempt(
            lm.attachment, checked, lambda: self._request(batch, num_tokens, checked), obstacle
        )
        if decoded is None:
            return self._by_generate(batch, num_tokens, checked, path)
        if isinstance(batch.cache, PagedCache):
            note_exposure(batch.cache)
        return from_loop(decoded, checked)

    def _request(self, batch: _Batch, num_tokens: int, checked: GenerateOptions) -> DecodeRequest:
        lm, rows = self.lm, batch.rows
        assert isinstance(lm.method, TokenMethod)
        longest = max(map(len, rows))
        runners, places = runners_of(lm.backbone, lm.method, lm.config.kv_budget, rows, num_tokens)
        settings = checked.loop_settings()
        if isinstance(runners, StreamRunners):
            settings["ahead"] = 0  # the host is never ahead of a step that isn't captured
        wants_ids = checked.streamer is not None or checked.criteria
        return DecodeRequest(
            rows=len(rows),
            places=places,
            fill=lambda cache: self._read_into(batch, cache),
            num_tokens=num_tokens,
            prompts=left_padded(rows, lm.pad_id, longest)[0] if wants_ids else None,
            streamer=checked.streamer,
            runners=runners,
            **settings,
        )

    @torch.no_grad()
    def _read_into(self, batch: _Batch, cache: PagedCache | RingCache | StreamCache) -> None:
        """Read the prompts, all but their last tokens, and hand them over; no logits yet."""
        backbone, last = self.lm.backbone, [ids[-1] for ids in batch.rows]
        with self._reading(batch):
            if isinstance(cache, StreamCache):
                return cache.begin(batch.stream, last)
            batch.cache = cache
            caches, lengths = batch.stream.read_so_far()
            ropes = [backbone.rope(layer) for layer in range(backbone.num_layers)]
            cache.fill(caches, ropes, lengths, last)

    @contextmanager
    def _reading(self, batch: _Batch) -> Iterator[None]:
        """Read the prompts, all but their last tokens; the stream runs until the block ends."""
        lm, backbone, stream = self.lm, self.lm.backbone, batch.stream
        batch.started = time.perf_counter()
        if stream.needs_question:
            questions = [prompt.question for prompt in batch.prompts]
            stream.questions = read_questions(backbone, lm.attachment, questions, lm.pad_id)
        with lm.attachment.run(stream):
            read_prompts(backbone, stream, [ids[:-1] for ids in batch.rows], lm.pad_id)
            stream.end_prefill()
            if backbone.device.type == "cuda":
                torch.cuda.synchronize(backbone.device)
            batch.read = time.perf_counter()
            yield

    @torch.no_grad()
    def _by_generate(self, batch: _Batch, num_tokens: int, checked: GenerateOptions, path: str) -> Continuation:
        lm, backbone, rows = self.lm, self.lm.backbone, batch.rows
        width = backbone.cache_room(max(map(len, rows)) - 1, num_tokens) + 1
        input_ids, mask = left_padded(rows, lm.pad_id, width)
        first = FirstToken()
        call = checked.call(num_tokens, first, checked.streamer)
        with self._reading(batch), generating(backbone, batch.stream, len(rows)):
            out = backbone.model.generate(
                input_ids=input_ids.to(backbone.device),
                attention_mask=mask.to(backbone.device).long(),
                **cache_argument(backbone.model, counting_cache(backbone.num_layers, width - 1)),
                **call.arguments,
            )
        return continuation(out, width, call, checked, first, path)

    def _answers(self, batch: _Batch, found: Continuation) -> list[Answer]:
        stream, rows = batch.stream, batch.rows
        prefill, decode = stream.prefill_counts(), batch.decode_counts(found.num_steps)
        kept = batch.kept_bytes(found.num_steps)
        dense = stream.dense_head_counts()
        method = self.lm.method
        assert isinstance(method, TokenMethod)
        answers = []
        notes, self._notes = self._notes, ()
        for i, (tokens, over) in enumerate(found.rows):
            steps = max(len(tokens), 1)
            outcome = Outcome(
                token_ids=tokens,
                ended=over,
                prefill=[layer[i] for layer in prefill],
                decode=[max((step[i] for step in layer[:steps]), default=0) for layer in decode],
                timings=batch.timings(found),
                device_bytes=kept[i],
                max_position=min(batch.max_position(found.num_steps), len(rows[i]) + len(tokens) - 2),
                dense_heads=tuple(max((step[i] for step in layer[:steps]), default=0) for layer in dense),
                left_dense=method.dense_layers(self.lm.backbone.num_layers),
                notes=notes,
                decode_path=found.path,
            )
            answers.append(prompt_answer(self.lm, outcome))
        return answers
