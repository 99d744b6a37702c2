"""Turn a GGUF file into an ordinary Hugging Face folder once, so that later loads need no GGUF code and are fast."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UserError

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
# Two quantisations of one matrix lie 4-7% apart (Frobenius norm, relative), two different matrices about 140%.
SAME_MATRIX = 0.2


def convert_gguf(gguf_file: Path, folder: Path, *, dtype: torch.dtype, window: int) -> None:
    """Write config.json, model.safetensors and the tokenizer read from `gguf_file` into the existing `folder`.

    Weights are dequantised and stored as `dtype`; `window`, in tokens, becomes the tokenizer's `model_max_length`.
    Raises `UserError` where the optional package `gguf` is missing.
    """
    require_gguf()
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' bars, which no setting turns off
        model = _load_dequantised(gguf_file, dtype)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    name_special_tokens(tokenizer, model.config)
    tokenizer.model_max_length = window
    tokenizer.save_pretrained(folder)
    save_clean(model, folder)


def require_gguf() -> None:
    """Raise `UserError` where the optional package `gguf` is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("Converting a GGUF file needs the package gguf. Install it: pip install 'retrolm[gguf]'")


def save_clean(model: PreTrainedModel, folder: Path) -> None:
    """Save weights and config without any trace of GGUF, which `model.save_pretrained` would refuse to write."""
    tensors = tie_head(dict(model.state_dict()))
    config = model.config
    config.tie_word_embeddings = HEAD not in tensors
    config.dtype = torch.float32  # what "auto" computes in: half a file's size must not mean half precision on a CPU
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights, {"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it readable by its owner only
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def tie_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo the splitting of a tied embedding: GGUF files may hold it twice, quantised to different precision.

    If `lm_head.weight` and `model.embed_tokens.weight` ([V, hidden]) are one matrix up to quantisation, the head, the
    finer copy, stands for both and its own key goes. Otherwise the tensors are returned as they are.
    """
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None or embedding is None or head.shape != embedding.shape:
        return tensors
    if torch.linalg.vector_norm((head - embedding).float()) > SAME_MATRIX * torch.linalg.vector_norm(head.float()):
        return tensors
    tied = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    return {**tied, EMBEDDING: head}


def name_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give the tokenizer the config's BOS, EOS and padding tokens: some transformers take a GGUF's BOS for its EOS."""
    for kind in ("bos", "eos", "pad"):
        number = getattr(config, f"{kind}_token_id", None)
        if isinstance(number, int):
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(number))


def _load_dequantised(gguf_file: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model
