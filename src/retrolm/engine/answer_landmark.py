"""Landmark Attention: prompts are read and answered one by one on the budget, nothing is kept between them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..methods.landmark import Landmark
from .answering import PROGRAMS, Outcome, Prompt, PromptProgram, prompt_answer
from .cache_argument import cache_argument
from .decode_round import Continuation, FirstToken, continuation
from .fast_decode import fast_decode_of
from .generate_options import GenerateOptions
from .landmark_rows import places_of_tokens
from .landmark_stream import LandmarkStream
from .landmarks import load_landmarks, require_groups
from .results import Answer, Timings
from .token_cache import counting_cache

if TYPE_CHECKING:
    from .model import RetroLM


@PROGRAMS.register("landmarks")
class LandmarkProgram(PromptProgram):
    """Chunked prefill and generation by `LandmarkStream`, with what was trained for it at work on the model.

    Raises:
        UserError: nothing was trained for this model, a model that can't take landmarks, or too small a budget.
    """

    brings_adapter = True

    def __init__(self, lm: RetroLM) -> None:
        super().__init__(lm)
        require_groups(lm.backbone)
        method = lm.method
        assert isinstance(method, Landmark) and method.knobs.weights is not None
        self._method = method
        self._landmarks = load_landmarks(Path(method.knobs.weights), lm.backbone)
        self._stream()  # refuses a budget that is too small

    def knobs(self) -> dict[str, Any]:
        """What was trained is told by its name and digest; the folder says nothing."""
        return {**super().knobs(), "weights": f"{self._landmarks.card.name} ({self._landmarks.digest()})"}

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any) -> list[Answer]:
        checked = GenerateOptions(self.lm.model, options, self.lm.eos_ids, self.lm.pad_id, self.lm.tokenizer)
        if checked.num_sequences > 1:
            raise UserError("Method 'landmark' generates one sequence per prompt. Leave out num_beams.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if not all(prompt.ids for prompt in prompts):
            raise UserError("Nothing to answer: a prompt has no tokens.")
        return [self._answer(prompt.ids, max_new_tokens, checked) for prompt in prompts]

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        stream, found = self._stream(), []
        with self._running(stream):
            for part in input_ids.split(stream.chunk_tokens):
                logits = self.lm.model(**stream.inputs(part[None]), use_cache=False).logits[0]
                found.append(logits[self._predicting(len(part)).to(logits.device)])
        return torch.cat(found)

    def check_attended(self, answer: Answer, num_tokens: int) -> None:
        """Nothing comes on top of the budget, generated tokens neither."""
        self.lm.method.check_attended(answer.attended_tokens, num_tokens, 1, self.allowed_tokens)

    def _predicting(self, num_tokens: int) -> Tensor:
        """The places of a chunk that predict what follows its tokens: behind a whole block it is the landmark's."""
        num_between = self._landmarks.num_between
        places = places_of_tokens(num_tokens, num_between)
        return places + (torch.arange(num_tokens) % num_between == num_between - 1)

    def _stream(self) -> LandmarkStream:
        return LandmarkStream(self.lm.backbone, self._method, self._landmarks, self.lm.config.kv_budget)

    @contextmanager
    def _running(self, stream: LandmarkStream) -> Iterator[None]:
        with self.lm.attachment.run(stream), self._landmarks.acting(self.lm.backbone):
            yield

    @torch.no_grad()
    def _answer(self, ids: list[int], num_tokens: int, checked: GenerateOptions) -> Answer:
        lm, stream = self.lm, self._stream()
        _, path = fast_decode_of(lm.attachment, lm.backbone).attempt(lm.attachment, checked, _never, "grouped softmax")
        last = (len(ids) - 1) // stream.chunk_tokens * stream.chunk_tokens
        started = time.perf_counter()
        with self._running(stream):
            for part in torch.tensor(ids[:last]).split(stream.chunk_tokens) if last else ():
                lm.backbone.decoder(**stream.inputs(part[None]), use_cache=False)
            with _generating(lm, stream, ids[last:]) as prefill:
                found = self._continued(ids, num_tokens, checked, path)
        return self._outcome(stream, found, prefill, started)

    def _continued(self, ids: list[int], num_tokens: int, checked: GenerateOptions, path: str) -> Continuation:
        lm, first = self.lm, FirstToken()
        call = checked.call(num_tokens, first, checked.streamer)
        inputs = torch.tensor([ids], device=lm.device)
        cache = counting_cache(lm.backbone.num_layers, len(ids) - 1)
        out = lm.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            **cache_argument(lm.model, cache),
            **call.arguments,
        )
        return continuation(out, len(ids), call, checked, first, path)

    def _outcome(self, stream: LandmarkStream, found: Continuation, prefill: list[int], started: float) -> Answer:
        ((tokens, over),) = found.rows
        outcome = Outcome(
            token_ids=tokens,
            ended=over,
            prefill=prefill,
            decode=stream.most_attended,
            timings=Timings(0.0, found.first_at - started, found.tpot_s),
            device_bytes=stream.kept_bytes(),
            max_position=stream.max_position,
            decode_path=found.path,
        )
        return prompt_answer(self.lm, outcome)


def _never() -> NoReturn:
    raise AssertionError("the engine's own loop knows no landmarks")


@contextmanager
def _generating(lm: RetroLM, stream: LandmarkStream, rest: list[int]) -> Iterator[list[int]]:
    """While `generate` runs: its first pass takes what is left of the prompt, later ones a token each, with landmarks.

    Yields:
        Most keys attended in each layer while the prompt was read; filled by the first pass. What the stream counts
        from then on, that pass included, is what generated tokens attended.
    """
    prefill: list[int] = []
    waiting: list[tuple[Any, int]] = []  # the cache, and how many tokens it counts when the pass is over

    def before_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        newest = torch.tensor([rest]) if not prefill else kwargs["input_ids"]
        inputs = stream.inputs(newest)
        cache = kwargs.get("cache") or kwargs["past_key_values"]
        waiting.append((cache, cache.get_seq_length() + 1))
        return args, {**kwargs, **inputs, "input_ids": None, "attention_mask": None}

    def after_pass(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        cache, num_tokens = waiting.pop()
        cache.crop(num_tokens)
        out.last_hidden_state = out.last_hidden_state[:, -1:]
        if not prefill:
            prefill.extend(stream.most_attended)
            stream.most_attended = [stream.last_attended] * len(prefill)
        return out

    decoder = lm.backbone.decoder
    handles = [
        decoder.register_forward_pre_hook(before_pass, with_kwargs=True),
        decoder.register_forward_hook(after_pass),
    ]
    try:
        yield prefill
    finally:
        for handle in handles:
            handle.remove()
