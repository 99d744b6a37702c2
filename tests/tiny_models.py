"""Tiny random models of every supported family, scaled so that each of the family's features matters.

`tiny_model(name)` builds one in float64; `FEATURES[name]` switches the model's features off, one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 128
WINDOW = 24  # tokens seen by a sliding layer
ORIGINAL = 64  # positions below which longrope uses its short factors
EOS = 1

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=4.0, beta_slow=0.5)
_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL
)
LONGROPE = _rope(
    "longrope",
    short_factor=[1.0, 1.5, 2.0],
    long_factor=[2.0, 4.0, 8.0],
    original_max_position_embeddings=ORIGINAL,
    partial_rotary_factor=0.5,
)
_PER_TYPE = {
    "sliding_attention": _rope("default"),
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1_000_000.0},
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_QWEN = {"attention_dropout": 0.0, "use_sliding_window": False}
_PHI3 = {"original_max_position_embeddings": ORIGINAL}
_GEMMA = {"query_pre_attn_scalar": 30, "sliding_window": WINDOW, "layer_types": _ALTERNATING}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4, "attention_bias": True},
    "llama-mqa": {"model_type": "llama", "num_key_value_heads": 1},
    "llama-linear": {"model_type": "llama", "rope_parameters": _rope("linear", factor=3.0)},
    "llama-llama3": {"model_type": "llama", "rope_parameters": _LLAMA3},
    "llama-yarn": {"model_type": "llama", "rope_parameters": _YARN},
    "llama-dynamic": {"model_type": "llama", "rope_parameters": _rope("dynamic", factor=4.0)},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2", **_QWEN},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", **_QWEN},
    "phi3": {"model_type": "phi3", **_PHI3, "rope_parameters": _rope("default", partial_rotary_factor=0.5)},
    "phi3-longrope": {"model_type": "phi3", **_PHI3, "rope_parameters": LONGROPE},
    "gemma2": {
        "model_type": "gemma2",
        **_GEMMA,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {"model_type": "gemma3_text", **_GEMMA, "rope_parameters": _PER_TYPE, "tie_word_embeddings": True},
}


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of tiny model `name`, with some fields changed."""
    fields = copy.deepcopy({**_SHAPE, **MODELS[name], **changes})
    if fields["model_type"] == "phi3":
        del fields["head_dim"]  # Phi-3 has none: hidden_size / num_attention_heads
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A tiny random model of one family; `changes` override fields of its configuration."""
    torch.manual_seed(seed)
    attention = "eager" if name == "gemma2" else "sdpa"  # sdpa knows no softcap
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(_random_weight(key, value, generator, gemma=name.startswith("gemma")))
    return model.to(dtype).eval()


def _random_weight(key: str, like: Tensor, generator: torch.Generator, gemma: bool) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if "norm" in key:
        return 0.3 * noise + (0.0 if gemma else 1.0)
    if like.dim() == 1:
        return 0.7 * noise
    if "embed_tokens" in key:
        return noise * (like.shape[1] ** -0.5 if gemma else 1.0)
    gain = 1.8 if any(part in key for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
    return gain * noise * like.shape[1] ** -0.5


@contextmanager
def wide_softmax() -> Iterator[None]:
    """Keep the softmax of eager attention in float64, where stock code asks for float32 whatever the model's dtype."""
    stock = nn.functional.softmax

    def softmax(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return stock(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    with mock.patch.object(nn.functional, "softmax", softmax):
        yield


@torch.no_grad()
def stock_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits [T, vocabulary] of the unmodified model at `ids` [T]."""
    with wide_softmax():
        logits: Tensor = model(ids[None]).logits[0]
    return logits


def random_ids(num_tokens: int, seed: int = 0) -> Tensor:
    """Token ids [num_tokens] without special tokens."""
    return torch.randint(2, VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(seed))


class ExactRotary(nn.Module):
    """A model's rotary module in float64 throughout, so that tests can tell rounding from mistakes."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.stock = rotary

    def frequencies(self, layer_type: str | None = None) -> tuple[Tensor, float]:
        """Angle per position of each rotary pair, and what cos and sin are multiplied with."""
        front = "" if layer_type is None else f"{layer_type}_"
        return getattr(self.stock, f"{front}inv_freq").double(), getattr(self.stock, f"{front}attention_scaling")

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        frequencies, scaling = self.frequencies(layer_type)
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


def exact_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """`tiny_model` whose rotary angles are computed in float64."""
    model = tiny_model(name, seed, **changes)
    model.model.rotary_emb = ExactRotary(model.model.rotary_emb)
    return model


# --- features that can be switched off -------------------------------------------------------------------------


def rebuilt(name: str, model: Any, **changes: Any) -> Any:
    """The same weights under a changed configuration."""
    other = tiny_model(name, **changes)
    other.load_state_dict(model.state_dict())
    return other


def _option(**changes: Any) -> Callable[[str, Any], Any]:
    return lambda name, model: rebuilt(name, model, **changes)


def _no_bias(name: str, model: Any) -> Any:
    other = copy.deepcopy(model)
    for key, value in other.named_parameters():
        if key.endswith("bias"):
            nn.init.zeros_(value)
    return other


def _no_norm(*norms: str) -> Callable[[str, Any], Any]:
    def switch_off(name: str, model: Any) -> Any:
        other = copy.deepcopy(model)
        for layer in other.model.layers:
            for norm in norms:
                owner = layer if hasattr(layer, norm) else layer.self_attn
                setattr(owner, norm, nn.Identity())
        return other

    return switch_off


def _no_embedding_scale(name: str, model: Any) -> Any:
    other = copy.deepcopy(model)
    other.model.embed_tokens.embed_scale.fill_(1.0)
    return other


_NO_ROPE_SCALING = _option(rope_parameters=_rope("default"))
_NO_WINDOW = _option(sliding_window=None)
_PLAIN_SCALE = _option(query_pre_attn_scalar=12)
_NO_QK_NORM = _no_norm("q_norm", "k_norm")

FEATURES: dict[str, dict[str, Callable[[str, Any], Any]]] = {
    "llama": {"norms": _no_norm("input_layernorm"), "rope theta": _option(rope_parameters={"rope_theta": 10.0})},
    "llama-mha": {"biases": _no_bias},
    "llama-linear": {"linear": _NO_ROPE_SCALING},
    "llama-llama3": {"llama3": _NO_ROPE_SCALING},
    "llama-yarn": {
        "yarn": _NO_ROPE_SCALING,
        "attention factor": _option(rope_parameters={**_YARN, "attention_factor": 1.0}),
    },
    "mistral-sliding": {"window": _NO_WINDOW},
    "qwen2": {"biases": _no_bias},
    "qwen2-sliding": {"window": _option(use_sliding_window=False)},
    "qwen3": {"q and k norms": _NO_QK_NORM},
    "phi3": {"partial rotary": _option(rope_parameters=_rope("default", partial_rotary_factor=1.0))},
    "phi3-longrope": {
        "longrope": _option(rope_parameters=_rope("default", partial_rotary_factor=0.5)),
        "long factors": _option(rope_parameters={**LONGROPE, "long_factor": LONGROPE["short_factor"]}),
    },
    "gemma2": {
        "attention softcap": _option(attn_logit_softcapping=None),
        "logit softcap": _option(final_logit_softcapping=None),
        "query scale": _PLAIN_SCALE,
        "window": _option(sliding_window=512),
        "norms behind": _no_norm("post_attention_layernorm", "post_feedforward_layernorm"),
        "embedding scale": _no_embedding_scale,
    },
    "gemma3": {
        "rope per layer type": _option(rope_parameters=dict.fromkeys(_PER_TYPE, _PER_TYPE["full_attention"])),
        "linear factor": _option(
            rope_parameters={**_PER_TYPE, "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0}}
        ),
        "query scale": _PLAIN_SCALE,
        "window": _option(sliding_window=512),
        "q and k norms": _NO_QK_NORM,
    },
}
