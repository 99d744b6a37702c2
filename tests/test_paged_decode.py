"""Steps over a cache of fixed shape: what the methods' step-by-step path generates, attends and lets queries see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grids import some
from kept_logits import KeptLogits
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.results import Answer
from retrolm.errors import UserError
from retrolm.evaluation.dictation import Dictation
from retrolm.methods.retro_exposure import ExposureMeter, Revises
from tiny_models import exact_model, random_ids

NEW, BUDGET = 21, 24
COLUMNS: list[tuple[str, dict[str, Any]]] = [
    ("quest", {}),
    ("arkvale", {}),
    ("quest_retro", {"window": 1}),
    ("quest_retro", {"window": 2}),
    ("quest_retro", {"window": 6}),
    ("quest_retro", {"window": 3, "partials": "recomputed"}),
    ("arkvale_retro", {"window": 4}),
]
FAMILIES = ["llama", "llama-mqa", "qwen2", "qwen3", "phi3"]
LENGTHS = (50, 9, 1, 37)


def ask(
    family: str, method: str, knobs: dict[str, Any], decoding: str, lengths: tuple[int, ...] = LENGTHS, **options: Any
) -> tuple[list[Answer], Tensor, list[float]]:
    """Answers, logits [steps, B, vocabulary] and exposure."""
    config, keep, meter = RetroConfig(kv_budget=BUDGET, page_size=8), KeptLogits(), ExposureMeter()
    knobs = {"page": 4, "num_dense_layers": 1, **knobs}
    lm = RetroLM(exact_model(family, seed=3), config=config, method=method, method_options=knobs)
    if isinstance(lm.method, Revises):
        lm.method.meter = meter
    rows = [random_ids(length, seed=length).tolist() for length in lengths]
    prompts = [Prompt((), tuple(ids[:-1]), tuple(ids[-1:])) for ids in rows]
    options = {"do_sample": False, "eos_token_id": None, "logits_processor": [keep], **options}
    answers = lm.answer(prompts, max_new_tokens=NEW, decoding=decoding, **options)
    lm.detach()
    return answers, torch.stack(keep.steps or [torch.zeros(0)]), meter.by_sample()


@pytest.mark.parametrize(("column", "family"), some(COLUMNS, FAMILIES, each=2))
def test_the_loop_does_what_generate_does(column: tuple[str, dict[str, Any]], family: str) -> None:
    """In the engine's own layers, and (Phi-3) in the model's."""
    method, knobs = column
    fast, logits, seen = ask(family, method, knobs, "fast")
    plain, expected, exposure = ask(family, method, knobs, "plain")
    assert (logits - expected).abs().max() < 1e-6 and seen == pytest.approx(exposure)
    for one, other in zip(fast, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.attended_by_layer == other.attended_by_layer and one.attended_tokens == other.attended_tokens
        assert one.kv_bytes == other.kv_bytes and one.max_position == other.max_position
        layers = "stock" if family == "phi3" else "fused"
        assert one.decode_path == f"{layers} layers, no graph" and other.decode_path == "generate"


def test_answers_end_alike_and_are_streamed_alike() -> None:
    """Rows that end early, and a cache that is used again for shorter texts."""
    options = {"eos_token_id": list(range(2, 12))}
    fast, _, _ = ask("llama", "quest_retro", {"window": 3}, "fast", **options)
    plain, _, _ = ask("llama", "quest_retro", {"window": 3}, "plain", **options)
    assert [one.token_ids for one in fast] == [one.token_ids for one in plain]
    assert [one.truncated for one in fast] == [one.truncated for one in plain]
    assert len({len(one.token_ids) for one in fast}) > 1
    assert [one.attended_tokens for one in fast] == [one.attended_tokens for one in plain]


def test_a_cache_that_is_used_again_remembers_nothing() -> None:
    lm = RetroLM(
        exact_model("llama"),
        config=RetroConfig(kv_budget=BUDGET, page_size=8),
        method="quest_retro",
        method_options={"page": 4, "num_dense_layers": 1, "window": 4},
    )

    def answer(length: int) -> Answer:
        ids = random_ids(length, seed=length).tolist()
        prompt = Prompt((), tuple(ids[:-1]), tuple(ids[-1:]))
        return lm.answer([prompt], max_new_tokens=12, do_sample=False, eos_token_id=None, decoding="fast")[0]

    short, _, again = answer(30), answer(90), answer(30)
    assert again.token_ids == short.token_ids and again.attended_by_layer == short.attended_by_layer


def test_sliding_layers_are_refused() -> None:
    lm = RetroLM(exact_model("gemma2"), config=RetroConfig(kv_budget=512, page_size=8), method="quest")
    with pytest.raises(UserError, match="sliding layers"):
        lm.answer([Prompt((), (5, 6), (7,))], max_new_tokens=3, decoding="fast")


def test_dictated_rows_go_by_the_loop() -> None:
    told = random_ids(NEW, seed=9)[None]
    found = []
    for decoding in ("fast", "plain"):
        dictation = Dictation(told, 2, NEW, (1, 2))
        ask("llama", "quest_retro", {"window": 3}, decoding, lengths=(50, 50), logits_processor=[dictation])
        found.append((dictation.said(), dictation.agrees(), dictation.losses(), dictation.ends()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0][0], told[0]) and found[0][3] == found[1][3]
    assert (found[0][2] - found[1][2]).abs().max() < 1e-6
