"""Steps over a ring of first and recent tokens: what the methods' token-by-token path generates and attends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kept_logits import KeptLogits
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.results import Answer
from tiny_models import exact_model, random_ids

NEW, BUDGET = 45, 21
METHODS: dict[str, dict[str, Any]] = {"streaming_llm": {"num_sink": 3}, "lm_infinite": {"num_global": 5}}
LENGTHS = (50, 9, 20, 21, 22, 37, 6)  # longer and shorter than the budget, and at its edge


def engine(family: str, method: str) -> RetroLM:
    config = RetroConfig(kv_budget=BUDGET, page_size=4)
    return RetroLM(exact_model(family, seed=3), config=config, method=method, method_options=METHODS[method])


def ask(lm: RetroLM, decoding: str, lengths: tuple[int, ...], **options: Any) -> tuple[list[Answer], Tensor]:
    """Answers, and logits [steps, B, vocabulary]."""
    keep = KeptLogits()
    rows = [random_ids(length, seed=length).tolist() for length in lengths]
    prompts = [Prompt((), tuple(ids[:-1]), tuple(ids[-1:])) for ids in rows]
    options = {"do_sample": False, "eos_token_id": None, "logits_processor": [keep], **options}
    return lm.answer(prompts, max_new_tokens=NEW, decoding=decoding, **options), torch.stack(keep.steps)


@pytest.mark.parametrize("family", ["llama", "llama-mha", "llama-mqa", "llama-yarn", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("method", list(METHODS))
def test_the_loop_does_what_generate_does(method: str, family: str) -> None:
    """In the engine's own layers, and (Phi-3) in the model's; the ring goes round twice."""
    lm = engine(family, method)
    fast, logits = ask(lm, "fast", LENGTHS)
    plain, expected = ask(lm, "plain", LENGTHS)
    assert (logits - expected).abs().max() < 2e-6
    for one, other in zip(fast, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.attended_by_layer == other.attended_by_layer and one.attended_tokens == other.attended_tokens
        assert one.kv_bytes == other.kv_bytes and one.max_position == other.max_position
        layers = "stock" if family == "phi3" else "fused"
        assert one.decode_path == f"{layers} layers, no graph" and other.decode_path == "generate"


@pytest.mark.parametrize("method", list(METHODS))
def test_a_ring_that_is_used_again_remembers_nothing(method: str) -> None:
    lm = engine("llama", method)
    short, logits = ask(lm, "fast", (8,))
    ask(lm, "fast", (90,))
    again, same = ask(lm, "fast", (8,))
    assert again[0].token_ids == short[0].token_ids and torch.equal(logits, same)


def test_answers_that_end_early_end_alike() -> None:
    lm, options = engine("llama", "streaming_llm"), {"eos_token_id": list(range(2, 12))}
    fast, _ = ask(lm, "fast", LENGTHS, **options)
    plain, _ = ask(lm, "plain", LENGTHS, **options)
    assert [one.token_ids for one in fast] == [one.token_ids for one in plain]
    assert [one.attended_tokens for one in fast] == [one.attended_tokens for one in plain]
    assert len({len(one.token_ids) for one in fast}) > 1


@pytest.mark.parametrize(("family", "lengths"), [("gemma2", LENGTHS), ("llama", (50, 3, 1))])
def test_what_has_no_ring_is_run_as_it_comes(family: str, lengths: tuple[int, ...]) -> None:
    """Sliding layers, and a prompt shorter than what always stays."""
    lm = engine(family, "streaming_llm")
    fast, logits = ask(lm, "fast", lengths)
    plain, expected = ask(lm, "plain", lengths)
    assert (logits - expected).abs().max() < 2e-6
    assert [one.attended_by_layer for one in fast] == [one.attended_by_layer for one in plain]
