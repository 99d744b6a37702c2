"""Answers of token methods without a step of fixed shape, by the engine's own loop: each step is run as it comes.

Nothing is captured, but layers take few kernels where the model has fused ones, and nothing of `generate` stands
between two tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from .backbone import Backbone
from .fast_decode import Runner
from .prefill_layers import can_fuse, fused_rows
from .token_stream import TokenStream


class StreamCache:
    """Stands where other loops have a cache: a `TokenStream` keeps what it read, and is known here while it answers.

    Attributes:
        tokens_B: the newest token, not fed yet, int64.
    """

    places = sys.maxsize

    def __init__(self, batch: int, device: torch.device) -> None:
        self.tokens_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._stream: ReferenceType[TokenStream] | None = None

    @property
    def batch(self) -> int:
        return len(self.tokens_B)

    @property
    def stream(self) -> TokenStream:
        """The one that answers."""
        stream = None if self._stream is None else self._stream()
        assert stream is not None
        return stream

    def rewind(self) -> None:
        """A step needs no rehearsal."""

    def begin(self, stream: TokenStream, last: Sequence[int]) -> None:
        """Go on where a stream has read its prompts but for their `last` tokens."""
        self._stream = ref(stream)
        self.tokens_B.copy_(torch.tensor(last))


class StreamProgram:
    """What the stream does (a `Program`)."""

    def __init__(self, cache: StreamCache) -> None:
        self._cache = cache

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """There are no bookmarks."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        return self._cache.stream.attend(layer, q, k, v, scale, softcap)


class StreamStep:
    """Feeds the newest tokens, at position 0 for the stock model.

    Attributes:
        layers: what runs the layers, for reports.
    """

    def __init__(self, backbone: Backbone, cache: StreamCache, program: StreamProgram) -> None:
        self._backbone, self._cache, self._program = backbone, cache, program
        self._fused = can_fuse(backbone)
        self.layers = "fused layers" if self._fused else "stock layers"

    def __call__(self) -> Tensor:
        """Logits [B, vocabulary] behind the newest tokens."""
        tokens_B1, model = self._cache.tokens_B[:, None], self._backbone.model
        self._cache.stream.begin([1] * len(tokens_B1), is_prefill=False)
        if not self._fused:
            zeros = torch.zeros_like(tokens_B1)
            stock: Tensor = model(input_ids=tokens_B1, position_ids=zeros, use_cache=False).logits[:, -1]
            return stock
        head: Any = model.get_output_embeddings()
        states = fused_rows(self._backbone, self._program, model.get_input_embeddings()(tokens_B1), wanted=True)
        assert states is not None
        logits: Tensor = head(states[:, -1])
        return logits


@dataclass(frozen=True)
class StreamRunners:
    """Builds runners for any stream."""

    def __call__(self, backbone: Backbone, batch: int, places: int) -> Runner:
        """See `DecodeRequest.runners`."""
        cache = StreamCache(batch, backbone.device)
        program = StreamProgram(cache)
        return Runner(backbone, cache, program, StreamStep(backbone, cache, program), captured=False)
