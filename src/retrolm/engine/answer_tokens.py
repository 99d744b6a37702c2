"""Methods that choose token by token: prompts are read and answered on the budget, nothing is kept between them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from ..methods.token_base import RepeatScores, TokenMethod
from .answering import PROGRAMS, Outcome, Prompt, PromptProgram, prompt_answer
from .decode_round import FirstToken, ended
from .generate_options import GenerateOptions
from .question_reading import read_questions
from .repeat_reading import repeat_scores
from .results import Answer, Timings
from .stock import left_padded
from .token_cache import counting_cache
from .token_stream import TokenStream, generating, read_prompts

if TYPE_CHECKING:
    from .model import RetroLM


@dataclass(frozen=True)
class _Generated:
    """Rows generated for a batch, whether each came to an end of its own, and when (`time.perf_counter`)."""

    rows: list[tuple[list[int], bool]]
    started: float
    read: float
    first: float
    finished: float
    num_steps: int

    @property
    def timings(self) -> Timings:
        """Of the whole batch."""
        per_token = (self.finished - self.first) / max(self.num_steps - 1, 1)
        return Timings(self.read - self.started, self.first - self.read, per_token)


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
        stream = self._stream(len(rows), max(map(len, rows)) + max_new_tokens)
        found = self._generate(stream, prompts, max_new_tokens, checked)
        return self._answers(stream, rows, found)

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

    @torch.no_grad()
    def _generate(
        self, stream: TokenStream, prompts: Sequence[Prompt], num_tokens: int, checked: GenerateOptions
    ) -> _Generated:
        lm, backbone, rows = self.lm, self.lm.backbone, [prompt.ids for prompt in prompts]
        longest = max(map(len, rows))
        width = backbone.cache_room(longest - 1, num_tokens) + 1
        input_ids, mask = left_padded(rows, lm.pad_id, width)
        first = FirstToken()
        call = checked.call(num_tokens, first, checked.streamer)
        started = time.perf_counter()
        if stream.needs_question:
            stream.questions = read_questions(
                backbone, lm.attachment, [prompt.question for prompt in prompts], lm.pad_id
            )
        with lm.attachment.run(stream):
            read_prompts(backbone, stream, [ids[:-1] for ids in rows], lm.pad_id)
            stream.end_prefill()
            if backbone.device.type == "cuda":
                torch.cuda.synchronize(backbone.device)
            read = time.perf_counter()
            with generating(backbone, stream, len(rows)):
                out = backbone.model.generate(
                    input_ids=input_ids.to(backbone.device),
                    attention_mask=mask.to(backbone.device).long(),
                    past_key_values=counting_cache(backbone.num_layers, width - 1),
                    **call.arguments,
                )
        finished = time.perf_counter()
        stops = call.stop.stops(len(rows), width)
        found = [ended(row, checked.eos_ids, stop) for row, stop in zip(out[:, width:].tolist(), stops, strict=True)]
        return _Generated(found, started, read, first.at, finished, out.shape[1] - width)

    def _answers(self, stream: TokenStream, rows: list[list[int]], found: _Generated) -> list[Answer]:
        prefill, decode, kept = stream.prefill_counts(), stream.decode_counts(), stream.kept_bytes()
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
                timings=found.timings,
                device_bytes=kept[i],
                max_position=min(stream.max_position, len(rows[i]) + len(tokens) - 2),
                dense_heads=tuple(max((step[i] for step in layer[:steps]), default=0) for layer in dense),
                left_dense=method.dense_layers(self.lm.backbone.num_layers),
                notes=notes,
            )
            answers.append(prompt_answer(self.lm, outcome))
        return answers
