"""Dense answers by the engine's own loop: the stock model's tokens, over one cache of the whole prompts."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine.dense_decode import places_for_prompt
from retrolm.engine.fast_decode import FastDecode, Runner, fast_decode_of
from retrolm.engine.model import RetroLM
from retrolm.engine.stock import StockAnswer, stock_answers
from retrolm.errors import UserError
from test_decode_stopping import Streamed, Watch
from tiny_models import EOS, random_ids, tiny_model

NAMES = ["llama", "llama-mha", "llama-yarn", "llama-llama3", "mistral", "qwen2", "qwen3", "phi3"]
LENGTHS = [1, 37, 90, 8]


def attach(name: str = "llama") -> RetroLM:
    return RetroLM(tiny_model(name), config=RetroConfig(page_size=8), method="full")


def prompts(lengths: list[int]) -> list[list[int]]:
    return [random_ids(length, length).tolist() for length in lengths]


def answers(lm: RetroLM, rows: list[list[int]], decoding: str = "fast", **options: Any) -> list[StockAnswer]:
    torch.manual_seed(3)
    return stock_answers(lm, rows, **{"max_new_tokens": 12, "do_sample": False, "decoding": decoding, **options})


def facts(found: list[StockAnswer]) -> list[tuple[Any, ...]]:
    return [(answer.token_ids, answer.num_attended, answer.truncated) for answer in found]


def runners(lm: RetroLM) -> list[Runner]:
    return list(fast_decode_of(lm.attachment, lm.backbone)._runners.values())


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_the_stock_models(name: str) -> None:
    """Of one prompt alone, and of prompts of unlike lengths side by side."""
    lm, rows = attach(name), prompts(LENGTHS)
    expected = []
    for ids in rows:
        out = lm.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=EOS)
        expected.append(tuple(out[0, len(ids) :].tolist()))
    assert [answer.token_ids for answer in answers(lm, rows)] == expected
    assert [answers(lm, [ids])[0].token_ids for ids in rows] == expected


WAYS: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 1.6, "top_k": 30},
    {"eos_token_id": list(range(2, 20))},
    {"eos_token_id": [], "do_sample": True, "top_p": 0.8},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("lengths", [[37], [37, 90, 8]], ids=str)
def test_ways_of_choosing_and_stopping_equal_generate(lengths: list[int], options: dict[str, Any]) -> None:
    lm, rows, found = attach("qwen2"), prompts(lengths), []
    for decoding in ("fast", "plain"):
        watch, streamed = Watch([5, 9, 2]), Streamed()
        given = {"stopping_criteria": [watch], "streamer": streamed, **options}
        found.append((facts(answers(lm, rows, decoding, **given)), watch.calls, streamed.seen))
    assert found[0] == found[1]


def test_answers_state_what_was_attended_and_what_decoded() -> None:
    lm, rows = attach(), prompts([30, 70])
    for decoding, path in (("fast", "fused layers, no graph"), ("auto", "generate")):
        found = answers(lm, rows, decoding, stopping_criteria=[Watch([3, 8])], eos_token_id=[])
        assert {answer.decode_path for answer in found} == {path}
        assert [answer.num_attended for answer in found] == [30 + 2, 70 + 7]
        assert len({answer.tpot_s for answer in found}) == 1 and found[0].ttft_s > 0


def test_there_is_one_cache_and_no_copy_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before is gone when a larger one, or one for other rows, is made; nothing else holds the prompt."""
    lm, alive = attach(), list[list[Any]]()
    caches: list[weakref.ref[Any]] = []
    real = Runner.__init__

    def make(self: Runner, *args: Any, **kwargs: Any) -> None:
        alive.append([cache for cache in caches if cache() is not None])
        real(self, *args, **kwargs)
        caches.append(weakref.ref(self.cache))

    monkeypatch.setattr(Runner, "__init__", make)
    for lengths in ([200], [210], [800], [30], [30, 40]):
        answers(lm, prompts(lengths))
        (places,) = [runner.cache.places for runner in runners(lm)]
        assert max(lengths) + 12 <= places <= max(256, 1.25 * (max(lengths) + 256))
    assert alive == [[]] * 4  # 200 and 210 share one
    lm.detach()
    assert runners(lm) == [] and all(cache() is None for cache in caches)


def test_the_prompt_is_written_where_the_loop_reads() -> None:
    """Against the cache of a plain pass: same keys and values, at the places behind each row's start."""
    lm, rows = attach(), prompts([30, 70])
    answers(lm, rows, max_new_tokens=1)
    (runner,) = runners(lm)
    for row, ids in enumerate(rows):
        with torch.no_grad():
            expected = lm.model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
        for layer in range(lm.backbone.num_layers):
            start = int(runner.cache.starts_LB[layer, row])
            assert start == 70 - len(ids)
            assert torch.equal(runner.cache.keys[layer][row, :, start:69], expected.layers[layer].keys[0])
            assert torch.equal(runner.cache.values[layer][row, :, start:69], expected.layers[layer].values[0])


@pytest.mark.parametrize("num_tokens", [1, 255, 256, 257, 9000, 131_072, 131_073])
def test_places_are_few_more_than_needed(num_tokens: int) -> None:
    places = places_for_prompt(num_tokens)
    assert num_tokens <= places < num_tokens + max(256, num_tokens / 8)


OBSTACLES: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3", {}, "sliding layers"),
    ("llama-dynamic", {}, "the RoPE type switches"),
    ("llama", {"num_beams": 2}, "num_beams=2"),
]


@pytest.mark.parametrize(("name", "options", "reason"), OBSTACLES, ids=[name for name, *_ in OBSTACLES])
def test_what_the_loop_cannot_do_goes_through_generate(name: str, options: dict[str, Any], reason: str) -> None:
    lm, rows = attach(name), prompts([37, 50])
    with pytest.raises(UserError, match=f"decoding='fast' can't be had here: .*{reason}"):
        answers(lm, rows, **options)
    assert all(reason in answer.decode_path for answer in answers(lm, rows, "auto", **options))


def test_what_cannot_be_answered_is_refused() -> None:
    lm = attach()
    for options, reason in (
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"do_sample": True, "num_return_sequences": 2}, "one sequence per prompt"),
    ):
        with pytest.raises(UserError, match=reason):
            answers(lm, prompts([9]), **options)
    with pytest.raises(UserError, match="a prompt has no tokens"):
        answers(lm, [[3, 4], []])


def test_it_is_the_default_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastDecode, "pays", lambda fast: True)
    (found,) = answers(attach(), prompts([20]), "auto")
    assert found.decode_path == "fused layers, no graph"
