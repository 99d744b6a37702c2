"""Token methods without a captured step, in the engine's own loop: what `generate` says, attends and keeps."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from grids import some
from kept_logits import KeptLogits
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.results import Answer
from retrolm.engine.token_stream import TokenStream
from retrolm.methods import METHODS
from retrolm.methods.first_and_recent import FirstAndRecent
from retrolm.methods.token_pages import PagedTokenMethod
from tiny_models import random_ids, tiny_model

NAMES = [
    name
    for name in METHODS
    if METHODS.get(name).kind == "tokens" and not issubclass(METHODS.get(name), PagedTokenMethod | FirstAndRecent)
]


def ask(lm: RetroLM, decoding: str, lengths: tuple[int, ...], **options: Any) -> tuple[list[Answer], Tensor]:
    """Answers, and logits [steps, B, vocabulary]."""
    keep = KeptLogits()
    rows = [random_ids(length, seed=length).tolist() for length in lengths]
    prompts = [Prompt((), tuple(ids[:-1]), tuple(ids[-1:])) for ids in rows]
    options = {"do_sample": False, "eos_token_id": None, "logits_processor": [keep], **options}
    return lm.answer(prompts, max_new_tokens=12, decoding=decoding, **options), torch.stack(keep.steps)


@pytest.mark.parametrize(("name", "family"), some(NAMES, ["llama", "llama-yarn", "qwen3", "gemma3"], each=2))
def test_the_loop_does_what_generate_does(name: str, family: str) -> None:
    """In the engine's own layers, and in the model's (yarn, Gemma)."""
    lm = RetroLM(tiny_model(family), config=RetroConfig(kv_budget=96, page_size=8), method=name)
    fast, logits = ask(lm, "fast", (150, 9, 96))
    plain, expected = ask(lm, "plain", (150, 9, 96))
    assert (logits - expected).abs().max() < 1e-6
    for one, other in zip(fast, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.attended_by_layer == other.attended_by_layer and one.attended_tokens == other.attended_tokens
        assert one.kv_bytes == other.kv_bytes and one.max_position == other.max_position
        layers = "fused" if family in ("llama", "qwen3") else "stock"
        assert one.decode_path == f"{layers} layers, no graph" and other.decode_path == "generate"


def test_answers_end_alike_and_their_stream_goes() -> None:
    lm, seen = RetroLM(tiny_model("llama"), config=RetroConfig(kv_budget=96, page_size=8), method="infllm"), []
    stock, options = lm.program._stream, {"eos_token_id": list(range(2, 40))}  # type: ignore[attr-defined]

    def noted(*args: Any) -> TokenStream:
        stream = stock(*args)
        seen.append(ref(stream))
        return stream  # type: ignore[no-any-return]

    lm.program._stream = noted  # type: ignore[attr-defined]
    fast, _ = ask(lm, "fast", (150, 9, 96), **options)
    plain, _ = ask(lm, "plain", (150, 9, 96), **options)
    assert [one.token_ids for one in fast] == [one.token_ids for one in plain]
    assert [one.attended_tokens for one in fast] == [one.attended_tokens for one in plain]
    assert len({len(one.token_ids) for one in fast}) > 1
    gc.collect()
    assert len(seen) == 2 and all(stream() is None for stream in seen)
