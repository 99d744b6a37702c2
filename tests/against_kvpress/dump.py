"""Writes what kvpress keeps of some prompts, and the logits after it. Runs in an environment of its own, not in ours.

    python dump.py FOLDER

For each tiny random model FOLDER/NAME gets the model and `reference.safetensors`: `ids`, `answer`, and per case
`CASE.logits` [step, vocabulary] and `CASE.kept.LAYER` [KV head, n], ascending.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from kvpress import (
    KeyRerotationPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

TOKENS, BUDGET, ANSWER = 200, 40, 6
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
MODELS = {
    "llama-4kv": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-2kv": {"model_type": "llama", "num_key_value_heads": 2},
    "llama-1kv": {"model_type": "llama", "num_key_value_heads": 1},
    "qwen2-2kv": {"model_type": "qwen2", "num_key_value_heads": 2},
}
# kvpress rounds T * (1 - ratio) down in floats: half a token more makes it BUDGET.
RATIO = 1 - (BUDGET + 0.5) / TOKENS
PRESSES: dict[str, Callable[[], object]] = {
    "snapkv": lambda: SnapKVPress(RATIO, window_size=8, kernel_size=5),
    "snapkv-wide": lambda: SnapKVPress(RATIO, window_size=16, kernel_size=9),
    "pyramidkv": lambda: PyramidKVPress(1 - BUDGET / TOKENS, window_size=8, kernel_size=5, beta=4),
    "streaming": lambda: StreamingLLMPress(RATIO, n_sink=4),
    "streaming-rerotated": lambda: KeyRerotationPress(StreamingLLMPress(RATIO, n_sink=4)),
    "tova": lambda: TOVAPress(RATIO),
    "observed": lambda: ObservedAttentionPress(RATIO),
}


def tiny_model(fields: dict[str, object]) -> torch.nn.Module:
    torch.manual_seed(0)
    fields = {**SHAPE, **fields}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    for name, value in model.named_parameters():
        gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
        torch.nn.init.normal_(value, 1.0 if "norm" in name else 0.0, 0.3 if value.dim() == 1 else gain * 48**-0.5)
    return model.double().eval()


def prefill(model: torch.nn.Module, ids: Tensor, press: object | None) -> tuple[DynamicCache, Tensor]:
    cache = DynamicCache()
    if press is None:
        return cache, model(ids, past_key_values=cache).logits[0, -1]
    with press(model):
        return cache, model(ids, past_key_values=cache).logits[0, -1]


def run(model: torch.nn.Module, ids: Tensor, answer: Tensor, name: str) -> dict[str, Tensor]:
    model.set_attn_implementation("eager" if name == "observed" else "sdpa")
    whole, _ = prefill(model, ids, None)
    cache, first = prefill(model, ids, PRESSES[name]())
    found = {f"{name}.kept.{layer}": places(whole, cache, layer) for layer in range(len(cache.layers))}
    start = cache.get_seq_length() if name == "streaming-rerotated" else ids.shape[1]
    logits = [first]
    for step, token in enumerate(answer[:-1]):
        position = torch.tensor([[start + step]])
        logits.append(model(token.view(1, 1), past_key_values=cache, position_ids=position).logits[0, -1])
    return {**found, f"{name}.logits": torch.stack(logits)}


def places(whole: DynamicCache, cache: DynamicCache, layer: int) -> Tensor:
    """Which tokens a layer kept, by their values (which no press changes)."""
    kept, full = cache.layers[layer].values[0], whole.layers[layer].values[0]
    same = torch.cdist(kept, full).argmin(-1)
    assert torch.equal(full.gather(1, same[..., None].expand_as(kept)), kept)
    return same.sort(-1).values


@torch.no_grad()
def main(folder: Path) -> None:
    for name, fields in MODELS.items():
        model = tiny_model(fields)
        model.save_pretrained(folder / name)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randperm(254, generator=generator)[None, :TOKENS] + 2  # no token twice: layer 0 tells them apart
        answer = torch.randint(2, 256, (ANSWER,), generator=generator)
        found = {"ids": ids[0], "answer": answer}
        for press in PRESSES:
            found |= run(model, ids, answer, press)
        save_file({key: value.contiguous() for key, value in found.items()}, folder / name / "reference.safetensors")
        print(f"{name}: {len(PRESSES)} presses")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
