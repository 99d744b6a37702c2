"""The seam to transformers: an attention function and hooks on q/k/v that act only while a program runs.

A *program* decides what attention and the bookmark projections do during one forward pass (prefill, decode, training).
Outside `Attachment.run` the model is exactly the stock model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface

from .backbone import Backbone
from .running import PROGRAM
from .wrapped import bypass_adapters

ATTENTION_NAME = "retrolm"


class Program(Protocol):
    """What a forward pass does in each layer.

    A program whose rows end in bookmarks says how many in `num_bookmarks`: adapters leave these out.
    One that sets `uses_stock_rope` works at true positions and leaves RoPE's frequencies to the stock module.
    """

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """Replace the output of projection `name`: `rows` [1, T, in] → `out` [1, T, out]; None keeps it."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Attention of [B, H, T, D] queries over [B, K, T', D] keys and values → [B, T, H, D]."""
        ...


class PassIsOver(Exception):  # noqa: N818 (nothing went wrong)
    """Raised by a program that has all it came for: the rest of the forward pass is left out."""


_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    program = PROGRAM.get()
    if program is None:
        raise RuntimeError(
            "This model is in use by RetroLM in another thread. Run passes of your own while RetroLM is idle."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return program.attend(int(module.layer_idx), query, key, value, scale, softcap), None  # type: ignore[arg-type]


class Attachment:
    """Binds a backbone to RetroLM; `detach` leaves the model as it was, bit for bit.

    One forward pass of a model runs at a time, whoever attached to it: `run` holds the model's lock, since the
    attention implementation is a setting of the model. Attachments to one model keep out of each other's passes.
    """

    def __init__(self, backbone: Backbone) -> None:
        AttentionInterface.register(ATTENTION_NAME, _attention)
        self._config: Any = backbone.layers[0].attention.config
        self._lock = _LOCKS.setdefault(backbone.decoder, threading.RLock())
        self._program: Program | None = None
        self._handles = bypass_adapters(backbone.decoder)
        self._handles += [
            getattr(layer.attention, name).register_forward_hook(self._projection_hook(index, name))
            for index, layer in enumerate(backbone.layers)
            for name in layer.projections
        ]
        if backbone.has_switching_rope:
            hook = self._rotary_hook(backbone)
            self._handles.append(backbone.decoder.rotary_emb.register_forward_hook(hook, with_kwargs=True))

    @contextmanager
    def run(self, program: Program) -> Iterator[None]:
        """Let `program` decide attention and bookmark projections until the block ends, or the program ends it."""
        with self._lock:
            before, outer = self._config._attn_implementation, self._program
            token = PROGRAM.set(program)
            self._program = program
            self._config._attn_implementation = ATTENTION_NAME
            try:
                with suppress(PassIsOver):
                    yield
            finally:
                self._config._attn_implementation = before
                self._program = outer
                PROGRAM.reset(token)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all other passes out of the model until the block ends."""
        with self._lock:
            yield

    def keep(self, handles: list[Any]) -> None:
        """Take charge of further hooks on the model; `detach` removes them too."""
        self._handles += handles

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _running(self) -> Program | None:
        """The program that this attachment runs in this thread, if any."""
        program: Program | None = PROGRAM.get()
        return program if program is self._program else None

    def _projection_hook(self, layer: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            program = self._running()
            return None if program is None else program.project(layer, name, args[0], out)

        return hook

    def _rotary_hook(self, backbone: Backbone) -> Any:
        """Keep to one set of frequencies, whatever length the stock module sees in a pass over compact positions."""

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, Tensor] | None:
            program = self._running()
            if program is None or getattr(program, "uses_stock_rope", False):
                return None
            positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            layer_type = args[2] if len(args) > 2 else kwargs.get("layer_type")
            cos, sin = backbone.rope_at(layer_type, positions)
            return cos.to(out[0]), sin.to(out[1])

        return hook
