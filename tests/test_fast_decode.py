"""The engine's own decoding loop generates what transformers' `generate` generates over the same sets."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from grids import pairs, some
from retrolm.config import RetroConfig
from retrolm.engine.compact_cache import CompactCache
from retrolm.engine.decode_round import Query
from retrolm.engine.decode_step import FUSED_FAMILIES, fused_obstacle
from retrolm.engine.fast_decode import compact_runner, fast_decode_of
from retrolm.engine.generation import Generator
from retrolm.engine.model import RetroLM
from retrolm.engine.stop_criteria import StopWhen
from retrolm.errors import UserError
from tiny_models import EOS, MODELS, random_ids, tiny_model

W = 8
SWITCHING = ("llama-dynamic", "phi3-longrope")
FIXED = [name for name in MODELS if name not in SWITCHING]


def attach(name: str, **options: Any) -> RetroLM:
    return RetroLM(tiny_model(name), config=RetroConfig.from_options({"kv_budget": 64, "page_size": W, **options}))


def both(lm: RetroLM, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """What the engine's own loop and `generate` make of the same prompts and random numbers."""
    found = []
    for decoding in ("fast", "plain"):
        torch.manual_seed(3)
        found.append(lm.generate(ids, decoding=decoding, **options))
    return found[0], found[1]


@pytest.mark.parametrize(("name", "num_tokens"), some(FIXED, [150, 40, W - 2, 1], each=2))
def test_greedy_tokens_equal_generate(name: str, num_tokens: int) -> None:
    """Sets beyond and within the budget, one token alone."""
    found, expected = both(attach(name), random_ids(num_tokens)[None], max_new_tokens=30, do_sample=False)
    assert found.tolist() == expected.tolist()


WAYS: list[dict[str, Any]] = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 1.7, "top_k": 20, "top_p": 0.8},
    {"do_sample": True, "top_k": None},
    {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
    {"do_sample": False, "eos_token_id": list(range(2, 30))},
    {"do_sample": False, "eos_token_id": list(range(2, 30)), "min_new_tokens": 4},
    {"do_sample": True, "eos_token_id": list(range(2, 20)), "num_return_sequences": 4},
]


@pytest.mark.parametrize(("name", "options", "retrieve_every"), pairs(["llama", "gemma2"], WAYS, [0, 5]))
def test_ways_of_choosing_equal_generate(name: str, options: dict[str, Any], retrieve_every: int) -> None:
    if retrieve_every and "num_return_sequences" in options:
        options = {**options, "num_return_sequences": 1}
    lm = attach(name, retrieve_every=retrieve_every)
    found, expected = both(lm, random_ids(90)[None], max_new_tokens=17, **options)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral-sliding", "gemma3"])
def test_batches_of_unlike_lengths_equal_generate(name: str) -> None:
    lengths = [3, 40, 141]
    ids, mask = torch.full((3, 141), EOS), torch.zeros(3, 141, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = random_ids(length, row), 1
    found, expected = both(attach(name), ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["llama", "llama-mha", "llama-yarn", "mistral-sliding", "qwen2", "qwen3"])
def test_fused_layers_equal_stock_layers(name: str) -> None:
    lm = attach(name)
    assert lm.backbone.config.model_type in FUSED_FAMILIES and fused_obstacle(lm.backbone) is None
    found = []
    for fused in (True, False):
        runner = compact_runner(lm.backbone, batch=2, places=64, fused=fused)
        scramble(runner.cache)
        with torch.no_grad(), lm.attachment.run(runner.program):
            found.append(torch.stack([runner.step().clone() for _ in range(3)]))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()


def scramble(cache: CompactCache) -> None:
    """A cache as two queries of unlike lengths leave it."""
    generator = torch.Generator().manual_seed(1)
    for x in (*cache.keys, *cache.values):
        x.copy_(torch.randn(x.shape, generator=generator))
    starts = torch.tensor([4, 17]).repeat(cache.batch)[: cache.batch]
    cache.starts_LB.copy_(starts.expand_as(cache.starts_LB))
    cache.index.fill_(40)
    cache.positions_B.copy_(40 - starts)
    cache.tokens_B.copy_(torch.arange(cache.batch) + 5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_model_stays_as_it_was(name: str) -> None:
    model = tiny_model(name)
    before = copy.deepcopy(model.state_dict())
    places = {key: value.data_ptr() for key, value in model.state_dict().items()}
    lm = RetroLM(model, config=RetroConfig(kv_budget=64, page_size=W))
    lm.generate(random_ids(90)[None], max_new_tokens=5, decoding="fast")
    lm.detach()
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key: value.data_ptr() for key, value in after.items()} == places


def test_answers_of_unlike_lengths_share_a_cache_safely() -> None:
    """A short question after a long one must not see what the long one left behind."""
    lm, fresh = attach("llama"), attach("llama")
    lm.generate(random_ids(150)[None], max_new_tokens=20, decoding="fast")
    after = lm.generate(random_ids(9)[None], max_new_tokens=20, decoding="fast")
    alone = fresh.generate(random_ids(9)[None], max_new_tokens=20, decoding="fast")
    assert after.tolist() == alone.tolist()


def test_a_replaced_weight_is_seen() -> None:
    """The steps kept from earlier answers must not go on with what the model no longer holds."""
    lm, ids = attach("llama"), random_ids(90)[None]
    lm.generate(ids, max_new_tokens=3, decoding="fast")
    kept = list(fast_decode_of(lm.attachment, lm.backbone)._runners.values())
    lm.generate(ids, max_new_tokens=3, decoding="fast")
    assert list(fast_decode_of(lm.attachment, lm.backbone)._runners.values()) == kept
    with torch.no_grad():
        lm.model.lm_head.weight = torch.nn.Parameter(lm.model.lm_head.weight.flip(0).clone())
    found, expected = both(lm, ids, max_new_tokens=8, do_sample=False)
    assert found.tolist() == expected.tolist()
    assert list(fast_decode_of(lm.attachment, lm.backbone)._runners.values()) != kept


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("retrieve_every", [0, 4])
def test_streamers_see_the_same(retrieve_every: int) -> None:
    lm = attach("llama", retrieve_every=retrieve_every)
    seen = []
    for decoding in ("fast", "plain"):
        streamer = Collect()
        lm.generate(random_ids(90)[None], max_new_tokens=10, decoding=decoding, streamer=streamer, do_sample=False)
        assert streamer.ended == 1
        seen.append(streamer.seen[1:])
    assert seen[0] == seen[1] and len(seen[0]) == 10


def test_a_stop_from_outside_is_seen() -> None:
    lm, event = attach("llama"), threading.Event()

    class StopThird(Collect):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.seen) == 4:  # the prompt and three tokens
                event.set()

    out = lm.generate(
        random_ids(90)[None],
        max_new_tokens=20,
        decoding="fast",
        streamer=StopThird(),
        stopping_criteria=[StopWhen(event)],
        do_sample=False,
    )
    assert out.shape[1] == 93


class Nothing(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


OBSTACLES: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "num_beams=2"),
    ({"repetition_penalty": 1.3}, "repetition_penalty=1.3"),
    ({"do_sample": True, "min_p": 0.1}, "min_p=0.1"),
    ({"bad_words_ids": [[5]]}, "bad_words_ids"),
    ({"logits_processor": [Nothing()]}, "a logits processor"),
]


@pytest.mark.parametrize(("options", "reason"), OBSTACLES, ids=[reason for _, reason in OBSTACLES])
def test_what_the_loop_cannot_do_is_said(options: dict[str, Any], reason: str) -> None:
    lm = attach("llama")
    with pytest.raises(UserError, match="decoding='fast' can't be had here") as error:
        lm.generate(random_ids(20)[None], max_new_tokens=3, decoding="fast", **options)
    assert reason in str(error.value)
    lm.generate(random_ids(20)[None], max_new_tokens=3, decoding="auto", **options)


@pytest.mark.parametrize("name", SWITCHING)
def test_rope_that_switches_is_left_to_generate(name: str) -> None:
    with pytest.raises(UserError, match="the RoPE type switches"):
        attach(name, kv_budget=32).generate(random_ids(20)[None], max_new_tokens=3, decoding="fast")


def test_hooks_on_the_model_are_left_to_generate() -> None:
    """A captured step would pass over what others do while a module runs."""
    lm = attach("llama")
    lm.model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out)
    with pytest.raises(UserError, match="hooks on the model's modules"):
        lm.generate(random_ids(20)[None], max_new_tokens=3, decoding="fast")


def test_an_unknown_way_of_decoding_is_refused() -> None:
    with pytest.raises(UserError, match=r"decoding='fats' is not a choice. Did you mean 'fast'"):
        attach("llama").generate(random_ids(20)[None], decoding="fats")


def test_what_decoded_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, queries = attach("qwen2"), list[Query]()
    real = Generator.run

    def run(self: Generator, given: list[Query], *args: Any) -> Any:
        queries.extend(given)
        return real(self, given, *args)

    monkeypatch.setattr(Generator, "run", run)
    for options in ({"decoding": "fast"}, {}, {"num_beams": 2}):
        lm.generate(random_ids(20)[None], max_new_tokens=3, **options)
    assert [query.decode_path for query in queries] == ["fused layers, no graph", "generate", "generate (num_beams=2)"]
