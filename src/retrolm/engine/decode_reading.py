"""Generated tokens on the host: read some steps behind the device, put to the criteria one by one, and streamed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .backbone import Backbone
from .stop_criteria import StopNote
from .token_choice import TokenChoice

LOOKAHEAD = 8  # steps that the host may be ahead of the tokens it has read


@dataclass
class DecodeRequest:
    """What to generate behind prompts whose keys and values `fill` puts into a cache.

    Attributes:
        rows: sequences side by side. places: that the cache needs at least.
        positions: that tokens may stand at; 0 = no more than places.
        fill: returns the logits [rows, V] of the first token where reading the prompts gave them, else None.
        runners: builds what runs, of (backbone, rows, places), for requests equal in it; None = over a compact cache.
        pad_id: what criteria and streamers see in a row that has ended, if there are tokens that end one.
        prompts: int64 [rows, T], as `generate` would be given them; needed by criteria and streamers only.
        criteria: asked about each token in order, as `generate` asks them.
        ahead: steps that the device may be ahead of what is read and checked; 0 = one token at a time.
        stopped: asked once per token; True ends the run. streamer: gets `prompts`, then the tokens [rows] of each step.
    """

    rows: int
    places: int
    fill: Callable[[Any], Tensor | None]
    num_tokens: int
    choice: TokenChoice
    positions: int = 0
    pad_id: int = 0
    prompts: Tensor | None = None
    criteria: list[Any] = field(default_factory=list)
    ahead: int = LOOKAHEAD
    stopped: Callable[[], bool] = bool
    streamer: BaseStreamer | None = None
    runners: Callable[[Backbone, int, int], Any] | None = None


class Tape:
    """Generated tokens on their way to the host, without making the device wait."""

    def __init__(self, num_steps: int, batch: int, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._rows = torch.empty(num_steps, batch, dtype=torch.int64, pin_memory=self._on_cuda)
        self._events: list[torch.cuda.Event] = []

    def put(self, step: int, tokens_B: Tensor) -> None:
        """Send the tokens of a step; nothing waits."""
        self._rows[step].copy_(tokens_B, non_blocking=True)
        if self._on_cuda:
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)

    def get(self, step: int) -> Tensor:
        """Tokens [B] of a step, once they are there."""
        if self._on_cuda:
            self._events[step].synchronize()
        return self._rows[step]


class Draws:
    """States of the random numbers behind each sampled step: those drawn for steps thrown away are given back."""

    def __init__(self, device: torch.device) -> None:
        cuda = torch.cuda.default_generators if device.type == "cuda" else ()
        index = device.index if device.index is not None or not cuda else torch.cuda.current_device()
        self._generator = cuda[index] if cuda else torch.default_generator
        self._states: list[Tensor] = []

    def note(self) -> None:
        """A step has drawn; nothing waits for the device."""
        self._states.append(self._generator.get_state())

    def back_to(self, num_steps: int) -> None:
        """Go on as if only so many steps had drawn."""
        if num_steps < len(self._states):
            self._generator.set_state(self._states[num_steps - 1])


class _Inquiry:
    """Puts each token to the criteria, behind its prompt, as `generate` would.

    On CUDA they are asked on a stream of their own: one that reads its tensors doesn't wait for the steps ahead.
    """

    def __init__(self, request: DecodeRequest, device: torch.device) -> None:
        assert request.prompts is not None
        self.note = StopNote(request.criteria, self._placed)
        self.width = request.prompts.shape[1]
        self._ids_BT = torch.nn.functional.pad(request.prompts, (0, request.num_tokens))
        self._num_ids = self._num_sent = self.width
        self._there_BT: Tensor | None = None
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def ask(self, tokens_B: Tensor) -> Tensor:
        """Which rows a criterion stops at these tokens, bool [B] on the host."""
        self._ids_BT[:, self._num_ids] = tokens_B
        self._num_ids += 1
        with self._beside():
            return self.note(self._ids_BT[:, : self._num_ids], None)

    def close(self) -> None:
        """Let the model's stream see what criteria have kept."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def stops(self) -> list[int]:
        """Tokens of each row when a criterion first held, 0 where none did."""
        return self.note.stops(len(self._ids_BT), self.width)

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _placed(self, criterion: Any, ids_BT: Tensor) -> Tensor:
        """The ids where the criterion would find them in `generate`."""
        if getattr(criterion, "on_host", False):
            return ids_BT
        if self._stream is None:
            return ids_BT.contiguous()
        if self._there_BT is None:
            self._there_BT = self._ids_BT.to(self._device)
        new = slice(self._num_sent, self._num_ids)
        self._there_BT[:, new] = self._ids_BT[:, new].to(self._device)
        self._num_sent = self._num_ids
        return self._there_BT[:, : self._num_ids].contiguous()


class Reader:
    """Reads tokens as they come: notes the time of the first, asks the criteria, streams; knows when all rows ended.

    Attributes:
        num_read: steps that were read. first_at: `time.perf_counter()` at the first of them.
    """

    def __init__(self, tape: Tape, request: DecodeRequest, device: torch.device) -> None:
        self._tape = tape
        self._request = request
        self._open_B = torch.ones(request.rows, dtype=torch.bool)
        self._ends = torch.tensor(request.choice.eos_ids, dtype=torch.int64)
        self._inquiry = _Inquiry(request, device) if request.criteria else None
        self._stopped_at = 0
        self.num_read = 0
        self.first_at = 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing more is wanted."""
        return bool(self._stopped_at) or not bool(self._open_B.any())

    def read(self, up_to: int) -> bool:
        """Read tokens until `up_to` steps are read; True once nothing more is wanted."""
        while self.num_read < up_to and not self.is_over:
            self._take(self._tape.get(self.num_read))
        return self.is_over

    def close(self) -> list[int]:
        """Nothing more is read; tokens of each row when it was stopped from outside or by a criterion, or 0."""
        stops = [0] * self._request.rows
        if self._inquiry is not None:
            self._inquiry.close()
            stops = self._inquiry.stops()
        return [at or self._stopped_at for at in stops]

    def _take(self, tokens_B: Tensor) -> None:
        request = self._request
        self.first_at = self.first_at or time.perf_counter()
        self.num_read += 1
        if request.choice.eos_ids:
            tokens_B = tokens_B.where(self._open_B, request.pad_id)
        self._open_B &= ~torch.isin(tokens_B, self._ends)
        if self._inquiry is not None:
            self._open_B &= ~self._inquiry.ask(tokens_B)
        if request.streamer is not None:
            request.streamer.put(tokens_B.clone())
        if request.stopped():
            self._stopped_at = self.num_read
