"""One decoding step over a compact cache of fixed shape: token in, logits out, nothing that waits for the device.

`StockStep` runs the stock model's own forward. `FusedStep` runs the layers of Llama-type models on the model's own
weights with a third of the kernels. Both give the same logits (tests compare them).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops.decode_layer import attend_token, gated, place_heads, project, rms_norm, store_token
from .attachment import Attachment
from .backbone import Backbone
from .compact_cache import CompactCache

FUSED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class Step(Protocol):
    """Feeds the cache's tokens, writes their keys and values, and advances it.

    Attributes:
        layers: what runs the layers, for reports.
    """

    layers: str

    def __call__(self) -> Tensor:
        """Logits [B, vocabulary]."""
        ...


class StaticProgram:
    """Attention of one generated token per sample over a compact cache of fixed shape (a `Program`)."""

    def __init__(self, backbone: Backbone, cache: CompactCache) -> None:
        self._backbone = backbone
        self._cache = cache

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """Generated tokens are normal tokens; nothing to replace."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        cache, window = self._cache, self._backbone.layers[layer].window
        keys, values = cache.keys[layer], cache.values[layer]
        store_token(keys, values, k[:, :, 0], v[:, :, 0], cache.index)
        starts = cache.starts_LB[layer]
        return attend_token(q[:, :, 0], keys, values, starts, cache.index, scale, softcap, window)[:, None]


class StockStep:
    """The stock model's forward; a `StaticProgram` over the same cache must be running."""

    layers = "stock layers"

    def __init__(self, backbone: Backbone, cache: CompactCache) -> None:
        self._backbone = backbone
        self._cache = cache

    def __call__(self) -> Tensor:
        cache = self._cache
        found = self._backbone.model(
            input_ids=cache.tokens_B[:, None],
            position_ids=cache.positions_B[:, None],
            use_cache=False,
            logits_to_keep=1,
        )
        cache.advance()
        logits: Tensor = found.logits[:, -1]
        return logits


class FusedStep:
    """The layers of a Llama-type model, computed on the weights that its modules hold; none is copied.

    Args:
        num_positions: that tokens may stand at.

    Raises:
        ValueError: a part of the model isn't what this step knows; `fused_obstacle` says so beforehand.
    """

    layers = "fused layers"

    def __init__(self, backbone: Backbone, cache: CompactCache, num_positions: int) -> None:
        obstacle = fused_obstacle(backbone)
        if obstacle is not None:
            raise ValueError(obstacle)
        self._cache = cache
        self._decoder = backbone.decoder
        self._head: Any = backbone.model.get_output_embeddings()
        self._windows = [info.window for info in backbone.layers]
        self._scale = backbone.head_dim**-0.5
        # A captured graph keeps addresses, and the shared table moves when it grows: this step has its own.
        backbone.require_positions(num_positions)
        positions = torch.arange(num_positions, device=backbone.device)
        self._cos, self._sin = (x.clone() for x in backbone.rope(0).at(positions))

    def __call__(self) -> Tensor:
        cache = self._cache
        x_BE = self._decoder.embed_tokens(cache.tokens_B)
        cos, sin = self._cos[cache.positions_B], self._sin[cache.positions_B]
        for layer, module in enumerate(self._decoder.layers):
            x_BE = self._attention(layer, module, x_BE, cos, sin)
            x_BE = mlp(module, x_BE)
        cache.advance()
        return project(norm(self._decoder.norm, x_BE), [self._head.weight], [self._head.bias])

    def _attention(self, layer: int, module: Any, x_BE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cache, attention = self._cache, module.self_attn
        keys, values = cache.keys[layer], cache.values[layer]
        qkv = project_heads(module, x_BE)
        norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
        eps = module.input_layernorm.variance_epsilon
        q_BHD = place_heads(qkv, cos, sin, keys, values, cache.index, norms, eps)
        starts, window = cache.starts_LB[layer], self._windows[layer]
        out = attend_token(q_BHD, keys, values, starts, cache.index, self._scale, None, window)
        return project(out.flatten(1), [attention.o_proj.weight], [attention.o_proj.bias], x_BE)


def project_heads(module: Any, x_BE: Tensor) -> Tensor:
    """A decoder layer's norm and its three projections side by side, [B, N]."""
    attention = module.self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    normed = norm(module.input_layernorm, x_BE)
    return project(normed, [part.weight for part in parts], [part.bias for part in parts])


def mlp(module: Any, x_BE: Tensor) -> Tensor:
    """A decoder layer's second half, with its residual."""
    own = module.mlp
    normed = norm(module.post_attention_layernorm, x_BE)
    inner = gated(normed, own.gate_proj.weight, own.up_proj.weight, (own.gate_proj.bias, own.up_proj.bias))
    return project(inner, [own.down_proj.weight], [own.down_proj.bias], x_BE)


def norm(module: Any, x_BE: Tensor) -> Tensor:
    """A root-mean-square norm module's output."""
    return rms_norm(x_BE, module.weight, module.variance_epsilon)


def fused_obstacle(backbone: Backbone) -> str | None:
    """Why `FusedStep` can't run this model, or None: everything it would pass over must be plain."""
    config = backbone.config
    if config.model_type not in FUSED_FAMILIES:
        return f"no fused layers for {config.model_type} models"
    if config.hidden_act != "silu":
        return f"no fused layers for the activation {config.hidden_act!r}"
    if backbone.rope(0).rotary_dims != backbone.head_dim:
        return "no fused layers for partial rotary dims"
    odd = [name for part in _linears(backbone) if (name := _odd_name(part))]
    odd += [type(part).__name__ for part in _norms(backbone) if not type(part).__name__.endswith("RMSNorm")]
    return f"no fused layers for {odd[0]} modules" if odd else None


def _odd_name(part: Any) -> str | None:
    """What is not plain about a linear module: its type, or that of its weight (quantised ones are of their own)."""
    if type(part) is not nn.Linear:
        return type(part).__name__
    return None if type(part.weight) is nn.Parameter else type(part.weight).__name__


def foreign_hook(model: nn.Module, others: tuple[str, ...] = ()) -> bool:
    """Whether someone else watches or changes what modules do: hooks, or weights that accelerate fetches.

    Args:
        others: modules whose hooks the caller knows of.
    """
    modules = list(model.modules())
    hooks = [h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    # Hooks of transformers' own only collect outputs that someone asks for.
    known = (Attachment.__module__, "transformers.", *others)
    return any(hasattr(m, "_hf_hook") for m in modules) or not all(_home(hook).startswith(known) for hook in hooks)


def _home(hook: Any) -> str:
    return str(getattr(hook, "__module__", ""))


def _linears(backbone: Backbone) -> Iterator[Any]:
    yield backbone.model.get_output_embeddings()
    for layer in backbone.decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _norms(backbone: Backbone) -> Iterator[Any]:
    yield backbone.decoder.norm
    for layer in backbone.decoder.layers:
        yield from (layer.input_layernorm, layer.post_attention_layernorm)
        if hasattr(layer.self_attn, "q_norm"):
            yield from (layer.self_attn.q_norm, layer.self_attn.k_norm)
