"""The layers of Llama-type models over a whole text, with gradients: few kernels, since launching them is what costs.

As in `prefill_layers` there is no rotation by position 0, which is none. The backbone's weights are constants here:
gradients go to an adapter. Shape letters: T tokens, M bookmarks, E hidden size, H, K, D heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.lora import adapted_linears
from .adapter import LoraAdapter, adapter_hooks
from .backbone import Backbone
from .decode_step import foreign_hook, fused_obstacle
from .layer_call import LayerCall
from .lora_groups import GROUPS, LoraGroup, lora_groups
from .mark_rows import MarkRows
from .sparse_pass import SparseProgram

Work = Callable[[Tensor, Sequence[Tensor]], Tensor]


def takes_text(backbone: Backbone, program: SparseProgram) -> bool:
    """Whether `text_rows` stands in for the stock decoder: a plain model on one device that isn't trained itself."""
    if program.frozen is not None or torch.is_autocast_enabled(backbone.device.type):
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in backbone.model.parameters()):
        return False
    plain = all(info.device == backbone.device for info in backbone.layers) and fused_obstacle(backbone) is None
    return plain and backbone.rope(0).scaling == 1.0 and _only_hooks_of(backbone, program.adapter)


def text_rows(backbone: Backbone, program: SparseProgram, rows_TE: Tensor, marks_ME: Tensor) -> Tensor:
    """What the head reads of a text, [T, E].

    Args:
        rows_TE, marks_ME: embeddings of tokens and bookmarks.
    """
    marks = MarkRows(backbone, program, marks_ME)
    x, checkpointed = rows_TE, _checkpointed(backbone) and torch.is_grad_enabled()
    for layer, groups in enumerate(lora_groups(backbone, program.adapter)):
        work = _TextLayer(backbone, program, marks, layer, groups)
        tensors = [part for group in groups for part in (group.down, *group.ups) if part is not None]
        x = _Again.apply(work, x, *tensors) if checkpointed else work(x, tensors)
    return _normed(backbone.decoder.norm, x)


def _only_hooks_of(backbone: Backbone, adapter: LoraAdapter | None) -> bool:
    """Whether nobody but RetroLM and this adapter acts on the modules."""
    expected = 0 if adapter is None else len(adapter.paths)
    of_adapters = len(adapter_hooks(backbone.model))
    return of_adapters == expected and not foreign_hook(backbone.model, (LoraAdapter.__module__,))


def _checkpointed(backbone: Backbone) -> bool:
    """Whether `text_loss.checkpoint_layers` was called."""
    first = backbone.decoder.layers[0]
    return bool(first.gradient_checkpointing and first.training)


class _TextLayer:
    """One layer over a text; the first run also brings its bookmarks on."""

    def __init__(
        self,
        backbone: Backbone,
        program: SparseProgram,
        marks: MarkRows,
        layer: int,
        groups: Sequence[LoraGroup],
    ) -> None:
        self._backbone, self._program, self._marks, self._layer = backbone, program, marks, layer
        self._module: Any = backbone.decoder.layers[layer]
        self._parts: list[list[Any]] = [[self._module.get_submodule(name) for name in names] for names in GROUPS]
        self._groups = groups
        adapter = program.adapter
        self._scale = 0.0 if adapter is None else adapter.alpha / adapter.rank

    def __call__(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Rows [T, E] → [T, E]; `tensors` are those of the adapter's groups, without the places that are empty."""
        groups = _filled(self._groups, tensors)
        layer = self._module
        q, k, v = self._linears(0, _normed(layer.input_layernorm, x), groups)
        (out,) = self._linears(1, self._attention(q, k, v).flatten(1), groups)
        x = x + out
        gate, up = self._linears(2, _normed(layer.post_attention_layernorm, x), groups)
        (out,) = self._linears(3, F.silu(gate) * up, groups)
        return x + out

    def _linears(self, number: int, rows: Tensor, groups: Sequence[LoraGroup]) -> tuple[Tensor, ...]:
        parts, group = self._parts[number], groups[number]
        weights, biases = [part.weight for part in parts], [part.bias for part in parts]
        return adapted_linears(rows, weights, biases, group.down, group.ups, self._scale)

    def _attention(self, *projected: Tensor) -> Tensor:
        """[T, H, D]."""
        attention, head_dim = self._module.self_attn, self._backbone.head_dim
        q, k, v = (x.unflatten(1, (-1, head_dim)) for x in projected)
        if hasattr(attention, "q_norm"):
            q, k = _normed(attention.q_norm, q), _normed(attention.k_norm, k)
        cut = self._program.pages
        pages = cut.paged(k), cut.paged(v)
        self._marks.step(self._layer, q, pages)
        call = LayerCall(self._layer, head_dim**-0.5, None)
        return self._program.sets.attend(call, q, k, v, pages, self._program.chosen[self._layer])


class _Again(torch.autograd.Function):
    """Checkpointing: keep a layer's input alone and run the layer again for its gradients."""

    @staticmethod
    def forward(ctx: Any, work: Work, *tensors: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(*tensors)
        return work(tensors[0], tensors[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        again = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            out = ctx.work(again[0], again[1:])
        found = iter(torch.autograd.grad(out, [x for x in again if x.requires_grad], grads[0]))
        return None, *(next(found) if need else None for need in needed)


def _filled(groups: Sequence[LoraGroup], tensors: Sequence[Tensor]) -> list[LoraGroup]:
    """The groups with `tensors` in the places that aren't empty."""
    rest = iter(tensors)
    return [
        replace(
            group,
            down=None if group.down is None else next(rest),
            ups=tuple(None if up is None else next(rest) for up in group.ups),
        )
        for group in groups
    ]


def _normed(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
