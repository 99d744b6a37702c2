"""What RetroLM needs to know of a stock transformers model: its layers, projections, windows and RoPE."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..retriever import ProjectionShape
from .placement import device_of, sent, weight_of
from .rope_table import RopeTable

FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED = ("qkv_proj",)


@dataclass(frozen=True)
class LayerInfo:
    """One decoder layer.

    Attributes:
        attention: its self-attention module. projections: names of the q/k/v projection modules in it.
        window: sliding window in tokens, or None for full attention.
        layer_type: key into the rope tables. device: where the layer computes.
        key_bias: constant part of the key projection [K*D], or None (also None where a norm follows).
    """

    attention: nn.Module
    projections: tuple[str, ...]
    window: int | None
    layer_type: str | None
    device: torch.device
    key_bias: Tensor | None

    @property
    def rotates_projections(self) -> bool:
        """Whether queries and keys are what `q_proj` and `k_proj` make, turned by RoPE and no more."""
        return self.projections == _SEPARATE and not hasattr(self.attention, "q_norm")


class Backbone:
    """A stock causal language model, looked at but not changed.

    Args:
        model: a transformers causal language model of a supported family.
        position_limit: positions that will be used at most; decides between the frequency sets of longrope.

    Raises:
        UnsupportedModelError: unknown family, RoPE type or layout, with what is missing.
    """

    def __init__(self, model: Any, position_limit: int) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        check_family(self.config)
        self.decoder = model.get_decoder()
        self.num_heads = int(self.config.num_attention_heads)
        self.num_kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.num_heads)
        head_dim = getattr(self.config, "head_dim", None)
        self.head_dim = int(head_dim or self.config.hidden_size // self.num_heads)
        self.hidden_size = int(self.config.hidden_size)
        self.layers = [self._layer(index, layer) for index, layer in enumerate(self.decoder.layers)]
        self.device = device_of(model.get_input_embeddings())
        self.dtype: torch.dtype = next(p.dtype for p in self.decoder.norm.parameters())
        self._ropes = self._rope_tables(position_limit)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def window(self) -> int:
        """Positions the model was trained for."""
        return int(self.config.max_position_embeddings)

    @property
    def all_layers_slide(self) -> bool:
        return all(layer.window is not None for layer in self.layers)

    def retrieves(self, layer: int) -> bool:
        """Whether a layer chooses pages; sliding layers of mixed models keep their window instead."""
        return self.layers[layer].window is None or self.all_layers_slide

    def rope(self, layer: int) -> RopeTable:
        return self._ropes[self.layers[layer].layer_type, self.layers[layer].device]

    @property
    def has_switching_rope(self) -> bool:
        """Whether the rotary module changes its frequencies with the length, and the tables hold one set."""
        return any(table.switches for table in self._ropes.values())

    def rope_at(self, layer_type: str | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin of one layer type, each [..., R], from the table fixed at load."""
        table = next(table for (kind, _), table in self._ropes.items() if kind == layer_type)
        return table.at(positions)

    def cache_room(self, num_tokens: int, num_new: int) -> int:
        """Places that a cache of `num_tokens` should have so that generation never reads it anew.

        Phi-3's `generate` throws a cache away when it grows past `original_max_position_embeddings`; one that
        begins beyond it is kept.
        """
        original = getattr(self.config, "original_max_position_embeddings", None)
        return original + 1 if original and num_tokens <= original < num_tokens + num_new else num_tokens

    def require_positions(self, num_positions: int) -> None:
        for table in self._ropes.values():
            table.require(num_positions)

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids [...] → [..., hidden], as the model's own forward does."""
        rows: Tensor = self.model.get_input_embeddings()(sent(ids, self.device))
        return rows

    def projection_shapes(self) -> list[ProjectionShape]:
        """Shapes of all projections that bookmark rows pass through with W^b."""
        widths = {"q_proj": self.num_heads, "k_proj": self.num_kv_heads, "v_proj": self.num_kv_heads}
        widths["qkv_proj"] = sum(widths.values())
        return [
            ProjectionShape(index, name, self.hidden_size, widths[name] * self.head_dim)
            for index, layer in enumerate(self.layers)
            for name in layer.projections
        ]

    def fingerprint(self) -> dict[str, Any]:
        """What a page retriever must agree with: family, shape and a digest of a few weights."""
        return {
            "model_type": self.config.model_type,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden_size,
            "vocab_size": int(self.config.vocab_size),
            "norm_digest": _norm_digest(self.decoder),
        }

    def _layer(self, index: int, layer: Any) -> LayerInfo:
        attention = layer.self_attn
        projections = next((names for names in (_SEPARATE, _FUSED) if all(hasattr(attention, n) for n in names)), None)
        if projections is None:
            raise UnsupportedModelError(
                f"Layer {index} of this {self.config.model_type!r} model has neither q_proj/k_proj/v_proj nor "
                "qkv_proj, which bookmark projections attach to."
            )
        types = getattr(self.config, "layer_types", None)
        per_type = _rope_per_type(self.config)
        return LayerInfo(
            attention=attention,
            projections=projections,
            window=_window(self.config, types[index] if types else None),
            layer_type=types[index] if types and per_type else None,
            device=device_of(attention),
            key_bias=self._key_bias(attention),
        )

    def _key_bias(self, attention: nn.Module) -> Tensor | None:
        projection: Any = getattr(attention, "k_proj", None)
        if getattr(projection, "bias", None) is None or hasattr(attention, "k_norm"):
            return None
        return weight_of(projection, "bias")

    def content_keys(self, layer: int, rows: Tensor, out: Tensor) -> Tensor | None:
        """The key projection of `rows` without its bias, or None if it has none.

        The bias is the same in every key and changes no ranking, but it reaches 211 in Qwen2: a low-precision key
        that holds it has lost what tells pages apart, so the projection is done again without it.

        Args:
            rows: normed inputs [..., hidden]. out: what the projection made of them, [..., K*D].
        """
        bias = self.layers[layer].key_bias
        if bias is None:
            return None
        module: Any = self.layers[layer].attention.k_proj
        plain = getattr(module, "base_layer", module)
        if any(x.is_meta for x in plain.parameters()):
            return out - bias  # its weights would have to be fetched a second time
        return _without_bias(plain, rows)

    def _rope_tables(self, position_limit: int) -> dict[tuple[str | None, torch.device], RopeTable]:
        rotary = getattr(self.decoder, "rotary_emb", None)
        if rotary is None:
            raise UnsupportedModelError(
                f"This {self.config.model_type!r} model has no rotary_emb module on its decoder."
            )
        tables = {}
        for layer in self.layers:
            key = (layer.layer_type, layer.device)
            if key not in tables:
                anchor, limit = _frequency_set(self.config, layer.layer_type, position_limit)
                tables[key] = RopeTable(rotary, layer.layer_type, self.dtype, layer.device, anchor, limit)
        return tables


def _without_bias(module: Any, rows: Tensor) -> Tensor:
    """What a linear module, quantised ones too, makes of `rows` if its bias is left out."""
    if type(module) is nn.Linear:
        return nn.functional.linear(rows, module.weight)
    bias, module.bias = module.bias, None
    try:
        out: Tensor = module.forward(rows)  # not through __call__, whose hooks would come back here
    finally:
        module.bias = bias
    return out


def check_family(config: Any) -> None:
    """Raise `UnsupportedModelError` for a model family RetroLM was not tested with."""
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"Models of type {config.model_type!r} are not supported. Supported: {', '.join(FAMILIES)}. "
            "docs/add_a_model_family.md says what a family needs."
        )


def _rope_per_type(config: Any) -> bool:
    """Whether the model has RoPE tables of its own for each layer type (Gemma 3)."""
    return isinstance(next(iter(config.rope_parameters.values()), None), dict)


def _window(config: Any, layer_type: str | None) -> int | None:
    if layer_type is not None and layer_type != "sliding_attention":
        return None
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        return None
    return int(window) if window else None


def _frequency_set(config: Any, layer_type: str | None, position_limit: int) -> tuple[int, int | None]:
    """Anchor and limit of a rope table (see `RopeTable`)."""
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(f"RoPE type {rope_type!r} is not supported. Supported: {', '.join(ROPE_TYPES)}.")
    if rope_type == "dynamic":
        return 0, int(config.max_position_embeddings)
    if rope_type == "longrope":
        original = int(parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        return (original, None) if position_limit > original else (0, original)
    return 0, None


def _norm_digest(decoder: nn.Module) -> str:
    """Digest of the norm weights, rounded so that the dtype a model is loaded in doesn't matter."""
    digest = hashlib.sha256()
    for path, module in decoder.named_modules():
        for name, value in module.named_parameters(recurse=False):
            if "norm" in path and value.dim() == 1 and "lora" not in path:
                weight = weight_of(module, name).float().cpu().to(torch.bfloat16)
                digest.update(weight.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
