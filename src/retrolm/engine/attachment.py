"""The seam to transformers: an attention function and hooks on q/k/v that act only while a program runs.

A *program* decides what attention and the bookmark projections do during one forward pass (prefill, decode, training).
Outside `Attachment.run` the model is exactly the stock model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from .backbone import Backbone

ATTENTION_NAME = "retrolm"


class Program(Protocol):
    """What a forward pass does in each layer."""

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """Replace the output of projection `name`: `rows` [1, T, in] → `out` [1, T, out]; None keeps it."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Attention of [B, H, T, D] queries over [B, K, T', D] keys and values → [B, T, H, D]."""
        ...


_PROGRAM: ContextVar[Program | None] = ContextVar("retrolm_program", default=None)


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
    program = _PROGRAM.get()
    if program is None:
        raise RuntimeError("RetroLM's attention was called outside a RetroLM forward pass")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return program.attend(int(module.layer_idx), query, key, value, scale, softcap), None  # type: ignore[arg-type]


class Attachment:
    """Binds a backbone to RetroLM; `detach` leaves the model as it was, bit for bit.

    One forward pass runs at a time: `run` holds a lock, since the attention implementation is a setting of the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        AttentionInterface.register(ATTENTION_NAME, _attention)
        self._config: Any = backbone.layers[0].attention.config
        self._lock = threading.RLock()
        self._handles = [
            getattr(layer.attention, name).register_forward_hook(_projection_hook(index, name))
            for index, layer in enumerate(backbone.layers)
            for name in layer.projections
        ]
        if backbone.has_switching_rope:
            hook = _rotary_hook(backbone)
            self._handles.append(backbone.decoder.rotary_emb.register_forward_hook(hook, with_kwargs=True))

    @contextmanager
    def run(self, program: Program) -> Iterator[None]:
        """Let `program` decide attention and bookmark projections until the block ends."""
        with self._lock:
            before = self._config._attn_implementation
            token = _PROGRAM.set(program)
            self._config._attn_implementation = ATTENTION_NAME
            try:
                yield
            finally:
                self._config._attn_implementation = before
                _PROGRAM.reset(token)

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _rotary_hook(backbone: Backbone) -> Any:
    """Keep to one set of frequencies, whatever length the stock module sees in a pass over compact positions."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        if _PROGRAM.get() is None:
            return None
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        layer_type = args[2] if len(args) > 2 else kwargs.get("layer_type")
        cos, sin = backbone.rope_at(layer_type, positions)
        return cos.to(out[0]), sin.to(out[1])

    return hook


def _projection_hook(layer: int, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        program = _PROGRAM.get()
        return None if program is None else program.project(layer, name, args[0], out)

    return hook
