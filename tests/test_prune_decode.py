"""Pruned answers by the engine's own loop: what `generate` gives, over a small cache at the prompts' true positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine.fast_decode import fast_decode_of
from retrolm.engine.model import RetroLM
from retrolm.engine.prune import Pruned, generate_pruned
from retrolm.engine.prune_pass import PrunePrompt
from retrolm.errors import UserError
from retrolm.methods import METHODS
from retrolm.methods.prune_base import PruneMethod
from test_decode_stopping import Streamed, Watch
from test_prune import method
from tiny_models import random_ids, tiny_model

NAMES = [name for name in METHODS if METHODS.get(name).kind == "prune"]
LENGTHS = [37, 90, 8]
BUDGET = 24


def attach(name: str = "llama") -> RetroLM:
    return RetroLM(tiny_model(name), config=RetroConfig(kv_budget=BUDGET, page_size=4), method="full")


def answers(lm: RetroLM, chosen: PruneMethod, lengths: list[int], decoding: str, **options: Any) -> list[Pruned]:
    rows = [PrunePrompt(random_ids(length, length).tolist(), 4) for length in lengths]
    torch.manual_seed(3)
    settings = {"max_new_tokens": 8, "do_sample": False, "decoding": decoding, **options}
    return generate_pruned(lm, chosen, rows, kv_budget=BUDGET, **settings)


def facts(found: list[Pruned]) -> list[tuple[Any, ...]]:
    return [(answer.token_ids, answer.ended, answer.kept, answer.attended) for answer in found]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama-mha", "qwen2", "phi3"])
def test_tokens_and_accounts_are_those_of_generate(name: str, family: str) -> None:
    """Ragged batches whose layers keep unlike numbers, shorter prompts whole; with and without the question apart."""
    lm = attach(family)
    for chosen in (method(name), method(name, question_agnostic=True)):
        loop, plain = (answers(lm, chosen, LENGTHS, decoding, eos_token_id=[]) for decoding in ("fast", "plain"))
        assert facts(loop) == facts(plain)
        assert {answer.decode_path for answer in plain} == {"generate"}
        assert all(answer.decode_path.endswith("layers, no graph") for answer in loop)
        assert max(max(step) for step in loop[1].attended) < 90


def test_kept_keys_that_move_stay_where_they_were_put() -> None:
    chosen = method("streaming_postfill", positions="compact")
    lm = attach("qwen2")
    assert facts(answers(lm, chosen, LENGTHS, "fast")) == facts(answers(lm, chosen, LENGTHS, "plain"))


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 30}, {"eos_token_id": list(range(2, 40))}], ids=str)
def test_ways_of_choosing_and_stopping_equal_generate(options: dict[str, Any]) -> None:
    lm, found = attach(), []
    for decoding in ("fast", "plain"):
        watch, streamed = Watch([5, 7, 2]), Streamed()
        given = {"stopping_criteria": [watch], "streamer": streamed, **options}
        found.append((facts(answers(lm, method("snapkv"), LENGTHS, decoding, **given)), watch.calls, streamed.seen))
    assert found[0] == found[1]


def test_the_cache_is_as_small_as_what_is_kept() -> None:
    """A prompt of 600 tokens stands in a cache of one rounding step, and a longer one makes room for its positions."""
    lm, chosen = attach("qwen2"), method("tova")
    for length in (300, 600):
        loop = answers(lm, chosen, [length], "fast", eos_token_id=[])
        (runner,) = fast_decode_of(lm.attachment, lm.backbone)._runners.values()
        assert runner.cache.places == 256
        row_bytes = 2 * lm.backbone.num_kv_heads * lm.backbone.head_dim * lm.backbone.dtype.itemsize
        assert loop[0].kv_bytes == lm.backbone.num_layers * (BUDGET + 7) * row_bytes
        assert facts(loop) == facts(answers(lm, chosen, [length], "plain", eos_token_id=[]))


def test_one_token_comes_from_the_prefill_alone() -> None:
    lm = attach()
    loop = answers(lm, method("h2o"), [40], "fast", max_new_tokens=1)
    assert facts(loop) == facts(answers(lm, method("h2o"), [40], "plain", max_new_tokens=1))
    assert loop[0].attended == []


def test_what_the_loop_cannot_do_is_said() -> None:
    lm = attach("mistral-sliding")
    with pytest.raises(UserError, match="a pruned prompt in sliding layers"):
        answers(lm, method("snapkv"), [40], "fast")
    assert answers(lm, method("snapkv"), [40], "auto")[0].decode_path.startswith("generate")
    with pytest.raises(UserError, match="Method 'snapkv' generates one sequence per prompt"):
        answers(lm, method("snapkv"), [40], "plain", num_return_sequences=2, do_sample=True)
