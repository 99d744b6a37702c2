"""A tiny random chat model saved as a folder, and a text to read with it: what the command line needs, in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_tokenizer import STORY, tiny_tokenizer


def save_tiny_model(folder: Path, **changes: Any) -> Path:
    """Save a random Llama of 3 layers with the tiny tokenizer into `folder`; `changes` override its configuration."""
    shape = {
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_story(path: Path, repeats: int = 3) -> Path:
    """Write a text of about 110 tokens per repeat."""
    path.write_text(STORY * repeats, encoding="utf-8")
    return path
