"""The engine's own decoding loop: one captured step, replayed per token over a cache of fixed shape.

On CUDA a step is a graph, and the host runs some steps ahead of the tokens it reads and puts to stopping criteria, so
that the device never waits; what lies behind the end is thrown away.
Without CUDA the same loop runs the step directly; it serves as the reference of the graph.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import UserError
from .adapter import LoraAdapter, adapter_hooks
from .attachment import Attachment, Program
from .backbone import Backbone
from .compact_cache import CompactCache
from .decode_reading import DecodeRequest, Draws, Reader, Tape
from .decode_step import FusedStep, StaticProgram, Step, StockStep, foreign_hook, fused_obstacle
from .generate_options import GenerateOptions

_KEPT = 2  # caches, one per batch size, that stay ready
_SPACIOUS = 1.25
_WARM_UPS = 2


@dataclass
class Decoded:
    """What a run generated.

    Attributes:
        rows: tokens of each sequence, all of the same number, at most as many as asked for. stops: how many of them a
            criterion or a stop from outside leaves, or 0.
        first_at, finished_at: `time.perf_counter()` at the first token and at the end.
        path: what ran, for reports.
    """

    rows: list[list[int]]
    stops: list[int]
    first_at: float
    finished_at: float
    path: str

    @property
    def num_steps(self) -> int:
        """Tokens that each row was given, also those behind its end."""
        return len(self.rows[0])


# What builds a runner (None: `compact_runner`), and for how many rows.
_Key = tuple[Callable[[Backbone, int, int], Any] | None, int]


def _key(request: DecodeRequest) -> _Key:
    return request.runners, request.rows


class FastDecode:
    """Decoding of one attached model; keeps caches and graphs for the next answers."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._runners: OrderedDict[_Key, Runner] = OrderedDict()
        self._failure: str | None = None
        self._captured: tuple[int, ...] = ()

    def obstacle(self) -> str | None:
        """Why this model can't be decoded here, or None."""
        backbone = self._backbone
        if self._failure is not None:
            return self._failure
        if backbone.has_switching_rope:
            return "the RoPE type switches with the length"
        if len({info.device for info in backbone.layers} | {backbone.device}) > 1:
            return "the layers are on several devices"
        foreign = foreign_hook(backbone.model, (LoraAdapter.__module__,))
        return "hooks on the model's modules" if foreign else None

    def pays(self) -> bool:
        """Whether this is the default: launching kernels is what decoding on CUDA spends its time on."""
        return self._backbone.device.type == "cuda"

    def attempt(
        self,
        attachment: Attachment,
        options: GenerateOptions,
        request: Callable[[], DecodeRequest],
        obstacle: str | None = None,
    ) -> tuple[Decoded | None, str]:
        """Generate if the options want this loop and nothing stands against it, such as a caller's `obstacle`.

        Returns what was generated, or None; and what generates, for reports: with None `generate`, and why.

        Raises:
            UserError: this loop is asked for and can't be had.
        """
        obstacle = obstacle or options.loop_obstacle() or self.obstacle()
        if obstacle is None and (options.decoding == "fast" or (options.decoding == "auto" and self.pays())):
            decoded = self.run(attachment, request())
            if decoded is not None:
                return decoded, decoded.path
            obstacle = self.obstacle()  # capturing has failed
        if options.decoding == "fast":
            raise UserError(f"decoding='fast' can't be had here: {obstacle}. Use decoding='auto'.")
        return None, "generate" + (f" ({obstacle})" if obstacle else "")

    @torch.no_grad()
    def run(self, attachment: Attachment, request: DecodeRequest) -> Decoded | None:
        """Generate; None if the step can't be captured here, which `obstacle` then explains."""
        with self._on_device(), attachment.alone():
            self._forget_other_weights()
            runner = self._runner(request)
            with attachment.run(runner.program):
                if not self._prepared(runner):
                    del self._runners[_key(request)]
                    return None
            first_BV = request.fill(runner.cache)
            if request.streamer is not None:
                request.streamer.put(request.prompts)
            with attachment.run(runner.program):
                decoded = _loop(runner, request, first_BV)
        if request.streamer is not None:
            request.streamer.end()
        return decoded

    def _runner(self, request: DecodeRequest) -> Runner:
        """One that is kept, or a new one in place of those that are too small or least used."""
        runner = self._runners.pop(_key(request), None)
        if runner is not None and not runner.has_room(request):
            runner = None  # its memory is free before another one is made
        if runner is None:
            while len(self._runners) >= _KEPT:
                self._runners.popitem(last=False)
            runner = self._built(request)
        self._runners[_key(request)] = runner
        return runner

    def _built(self, request: DecodeRequest) -> Runner:
        if request.runners is None:
            return compact_runner(self._backbone, request.rows, request.places, request.positions)
        found: Runner = request.runners(self._backbone, request.rows, request.places)
        return found

    def release_but(self, rows: int, places: int) -> None:
        """Give back caches for other numbers of rows, and one that is much larger than `places`."""
        for key, runner in list(self._runners.items()):
            if key != (None, rows) or runner.cache.places > _SPACIOUS * places:
                del self._runners[key]

    def _on_device(self) -> AbstractContextManager[Any]:
        """Streams and kernels belong to the current device, which need not be the model's."""
        device = self._backbone.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _forget_other_weights(self) -> None:
        """A captured step goes on reading the weights it was captured with: others, elsewhere, need a new one."""
        model = self._backbone.model
        hooks = adapter_hooks(model)
        weights = (*model.parameters(), *model.buffers(), *(x for hook in hooks for x in hook.pair.parameters()))
        found = (*map(id, (*model.modules(), *hooks)), *(x.data_ptr() for x in weights))
        if found != self._captured:
            self.release()
        self._captured = found

    def release(self) -> None:
        """Give caches and graphs back."""
        self._runners.clear()

    def remove(self) -> None:
        """As hooks are removed: when their attachment is detached."""
        self.release()

    def _prepared(self, runner: Runner) -> bool:
        try:
            runner.prepare()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            self._failure = f"capturing a CUDA graph failed: {reason}"
            warnings.warn(f"Decoding goes on without CUDA graphs: {self._failure}", RuntimeWarning, stacklevel=2)
            return False
        return True


def fast_decode_of(attachment: Attachment, backbone: Backbone) -> FastDecode:
    """The `FastDecode` that belongs to an attachment."""
    if attachment not in _OF:
        _OF[attachment] = FastDecode(backbone)
        attachment.keep([_OF[attachment]])
    return _OF[attachment]


_OF: WeakKeyDictionary[Attachment, FastDecode] = WeakKeyDictionary()


class StaticCache(Protocol):
    """What a runner asks of its cache, whose tensors keep their places.

    Attributes:
        tokens_B: tokens to feed next, int64. batch, places: samples, and room of each.
    """

    tokens_B: Tensor

    @property
    def batch(self) -> int: ...

    @property
    def places(self) -> int: ...

    def rewind(self) -> None:
        """Stand at the first place, whatever is in the cache."""
        ...


class Runner:
    """One cache and the step over it, captured as a graph on CUDA.

    Args:
        cache: which the step advances. program: that runs while it does. positions: that tokens may stand at.
        captured: whether the step can be captured.

    Attributes:
        path: what runs, for reports.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: StaticCache,
        program: Program,
        step: Step,
        positions: int = 0,
        captured: bool = True,
    ) -> None:
        self.cache = cache
        self.program = program
        self._step = step
        self._positions = positions
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._is_captured = captured and backbone.device.type == "cuda"
        self._device = backbone.device
        self.path = f"{self._step.layers}, {'CUDA graph' if self._is_captured else 'no graph'}"

    def has_room(self, request: DecodeRequest) -> bool:
        """Whether what is asked for fits."""
        return self.cache.places >= request.places and self._positions >= request.positions

    def prepare(self) -> None:
        """Capture the step if it can be, once; changes what is in the cache. Needs `program` to be running."""
        if not self._is_captured or self._graph is not None:
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.cache.rewind()
                for _ in range(_WARM_UPS):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Without a stream of its own it would capture on that of the first device that ever captured.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._logits = self._step()
            self._graph = graph

    def step(self) -> Tensor:
        """Logits [B, vocabulary] of the next step; overwritten by the one after it."""
        if self._graph is None or self._logits is None:
            return self._step()
        self._graph.replay()
        return self._logits


def has_fused_step(backbone: Backbone) -> bool:
    """Whether a step may run fused layers: the model has them, and no adapter is at work on it."""
    return fused_obstacle(backbone) is None and not adapter_hooks(backbone.model)


def compact_runner(
    backbone: Backbone, batch: int, places: int, positions: int = 0, fused: bool | None = None
) -> Runner:
    """Over a `CompactCache`; `fused` layers wherever the model has them, unless said otherwise."""
    cache, positions = CompactCache(backbone, batch, places), max(places, positions)
    if fused is None:
        fused = has_fused_step(backbone)
    step: Step = FusedStep(backbone, cache, positions) if fused else StockStep(backbone, cache)
    return Runner(backbone, cache, StaticProgram(backbone, cache), step, positions)


def steps_ahead(request: DecodeRequest, device: torch.device) -> int:
    """Steps that the loop may be ahead of what is read; a CPU would only compute what is thrown away."""
    return request.ahead if device.type == "cuda" else 0


def _loop(runner: Runner, request: DecodeRequest, first_BV: Tensor | None) -> Decoded:
    cache, device = runner.cache, runner.cache.tokens_B.device
    tape = Tape(request.num_tokens, cache.batch, device)
    reader = Reader(tape, request, device)
    ahead = steps_ahead(request, device)
    draws = Draws(device) if request.choice.sample and ahead else None
    for step in range(request.num_tokens):
        logits_BV = runner.step() if step or first_BV is None else first_BV
        tokens_B = request.choice(logits_BV, step)
        cache.tokens_B.copy_(tokens_B)
        tape.put(step, tokens_B)
        if draws is not None:
            draws.note()
        # The first token is read at once: it is what a user waits for.
        if reader.read(step + 1 - ahead if step else 1):
            break
    else:
        reader.read(request.num_tokens)
    finished_at = time.perf_counter()
    if draws is not None:
        draws.back_to(reader.num_read)
    rows = torch.stack([tape.get(step) for step in range(reader.num_read)], 1).tolist()
    return Decoded(rows, reader.close(), reader.first_at, finished_at, runner.path)
