"""F2: generating over the compact cache is transformers' `generate`, features and all, if the budget allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from tiny_models import EOS, MODELS, ORIGINAL, exact_model, random_ids, tiny_model, wide_softmax
from tiny_tokenizer import tiny_tokenizer

W = 8


def attach(model: Any, **options: Any) -> RetroLM:
    return RetroLM(model, config=RetroConfig.from_options({"kv_budget": 128, "page_size": W, **options}))


def both(model: Any, ids: Tensor, lm: RetroLM | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """What RetroLM and the stock model generate behind `ids` [B, T]."""
    lm = lm or attach(model)
    with wide_softmax():
        torch.manual_seed(7)
        found = lm.generate(ids, **options)
        torch.manual_seed(7)
        expected = model.generate(ids, **{"pad_token_id": EOS, "attention_mask": torch.ones_like(ids), **options})
    return found, expected


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("num_tokens", [9 * W + 3, 9 * W, W - 2])
def test_greedy_tokens_equal_generate(name: str, num_tokens: int) -> None:
    if name == "phi3-longrope":
        num_tokens += ORIGINAL
    model = tiny_model(name)
    lm = attach(model, kv_budget=200)
    found, expected = both(model, random_ids(num_tokens)[None], lm, max_new_tokens=30, do_sample=False)
    assert found.tolist() == expected.tolist()


def test_phi3_generating_past_its_original_window() -> None:
    """The stock model throws its cache away there; a compact cache must stay. (In transformers 5.17 it goes on with the
    last token alone, so the stock model answers without a cache here.)"""
    model, ids = tiny_model("phi3"), random_ids(ORIGINAL - 5)[None]
    with wide_softmax():
        found = attach(model).generate(ids, max_new_tokens=30, do_sample=False)
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            use_cache=False,
            pad_token_id=EOS,
        )
    assert found.tolist() == expected.tolist()


WAYS: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 1.5},
    {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    {"num_beams": 3, "do_sample": False},
    {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
    {"num_beams": 2, "do_sample": True},
    {"repetition_penalty": 1.7, "do_sample": False},
    {"no_repeat_ngram_size": 2, "do_sample": False},
    {"eos_token_id": list(range(2, 40)), "do_sample": False},
    {"eos_token_id": list(range(2, 40)), "min_new_tokens": 12, "do_sample": False},
    {"bad_words_ids": [[5], [9, 11]], "do_sample": False},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_ways_of_generating_equal_generate(name: str, options: dict[str, Any]) -> None:
    found, expected = both(tiny_model(name), random_ids(60)[None], max_new_tokens=20, **options)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("field", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_settings_of_the_models_own_generation_config_count(field: dict[str, Any]) -> None:
    model = tiny_model("llama")
    for key, value in field.items():
        setattr(model.generation_config, key, value)
    found, expected = both(model, random_ids(40)[None], max_new_tokens=10)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}, {"repetition_penalty": 1.5}], ids=str)
def test_left_padded_batch_equals_generate(options: dict[str, Any]) -> None:
    """Rows of 3, 40 and 61 tokens: one shorter than a page."""
    model, lengths = tiny_model("qwen2"), [3, 40, 61]
    lm = attach(model)
    ids, mask = torch.full((3, 61), EOS), torch.zeros(3, 61, dtype=torch.int64)
    for row, (length, seed) in enumerate(zip(lengths, (1, 2, 3), strict=True)):
        ids[row, -length:], mask[row, -length:] = random_ids(length, seed), 1
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=EOS, **options)
    found = lm.generate(ids, attention_mask=mask, max_new_tokens=12, **options)
    assert found.tolist() == expected.tolist()


def test_small_budget_batch_equals_one_at_a_time() -> None:
    model = exact_model("gemma3")
    lm = attach(model, kv_budget=4 * W)
    prompts = [random_ids(length, length) for length in (70, 33, 5, 90)]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=EOS) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    together = lm.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, prompt in zip(together, prompts, strict=True):
        alone = lm.generate(prompt[None], max_new_tokens=10, do_sample=False)
        assert row[width:].tolist() == alone[0, len(prompt) :].tolist()


class StopAt(StoppingCriteria):
    """Stops behind the n-th new token."""

    def __init__(self, num_new: int) -> None:
        self.num_new, self.seen = num_new, 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.seen += 1
        return torch.full((len(input_ids),), self.seen >= self.num_new)


@pytest.mark.parametrize("retrieve_every", [0, 4])
@pytest.mark.parametrize("stop", [3, 4, 6])
def test_stopping_criteria_stop(retrieve_every: int, stop: int) -> None:
    lm = attach(tiny_model("llama"), retrieve_every=retrieve_every)
    out = lm.generate(random_ids(40)[None], max_new_tokens=20, stopping_criteria=[StopAt(stop)], do_sample=False)
    assert out.shape[1] == 40 + stop


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-sliding"])
def test_retrieving_again_changes_nothing_within_the_budget(name: str) -> None:
    """Generated pages are encoded anew; with all pages attended that is the stock model again."""
    model = tiny_model(name)
    lm = attach(model, retrieve_every=7)
    found, expected = both(model, random_ids(60)[None], lm, max_new_tokens=30, do_sample=False)
    assert found.tolist() == expected.tolist()


def test_retrieving_again_needs_room_for_the_question() -> None:
    lm = attach(tiny_model("llama"), kv_budget=3 * W, retrieve_every=4)
    with pytest.raises(UserError, match=f"takes kv_budget={3 * W + 4} here; it is {3 * W}"):
        lm.generate(random_ids(40)[None], max_new_tokens=10)
    lm.generate(random_ids(W + 2)[None], max_new_tokens=10)
    enough = attach(tiny_model("llama"), kv_budget=3 * W + 4, retrieve_every=4)
    enough.generate(random_ids(40)[None], max_new_tokens=10)


def test_retrieving_again_takes_one_sequence_at_a_time() -> None:
    lm = attach(tiny_model("llama"), retrieve_every=4)
    with pytest.raises(UserError, match="num_return_sequences"):
        lm.generate(random_ids(40)[None], do_sample=True, num_return_sequences=2)


@pytest.mark.parametrize("num_tokens", [ORIGINAL - 3 * W, ORIGINAL - 4, ORIGINAL + 5])
def test_longrope_keeps_one_frequency_set_while_generating(num_tokens: int) -> None:
    """The set is fixed at load: decoding agrees with reading, also where the stock model would switch on the way."""
    lm = attach(tiny_model("phi3-longrope"))
    out = lm.generate(random_ids(num_tokens)[None], max_new_tokens=20, do_sample=False)[0]
    again = lm.logits(out).argmax(-1)
    assert out[num_tokens:].tolist() == again[num_tokens - 1 : -1].tolist()


def test_dynamic_rope_is_refused_beyond_the_window() -> None:
    model = tiny_model("llama-dynamic", max_position_embeddings=64)
    lm = attach(model, kv_budget=48)
    lm.generate(random_ids(200)[None], max_new_tokens=16, do_sample=False)
    with pytest.raises(UserError, match="allows 64"):
        lm.generate(random_ids(200)[None], max_new_tokens=40, do_sample=False)


def test_a_model_without_end_token_generates_on() -> None:
    model = tiny_model("llama", eos_token_id=None)
    model.generation_config.eos_token_id = None
    found, expected = both(model, random_ids(40)[None], max_new_tokens=60, do_sample=True, temperature=50.0)
    assert found.tolist() == expected.tolist()


def test_only_what_generate_knows_ends_a_prompt() -> None:
    """The tokenizer's or config's other end tokens end answers, not `generate`."""
    model = tiny_model("llama", eos_token_id=list(range(2, 60)))
    model.generation_config.eos_token_id = EOS
    found, expected = both(model, random_ids(40)[None], max_new_tokens=10, do_sample=False)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"assistant_model": object()}, {"past_key_values": object()}, {"inputs_embeds": object()}],
    ids=lambda options: next(iter(options)),
)
def test_what_the_compact_cache_rules_out_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        attach(tiny_model("llama")).generate(random_ids(40)[None], **options)


def test_unknown_option_names_the_closest() -> None:
    with pytest.raises(UserError, match="Did you mean 'temperature'"):
        attach(tiny_model("llama")).generate(random_ids(40)[None], temprature=1.0)


def test_no_tokens_to_generate_is_refused() -> None:
    with pytest.raises(UserError, match="max_new_tokens"):
        attach(tiny_model("llama")).generate(random_ids(40)[None], max_new_tokens=0)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="no tokens"):
        attach(tiny_model("llama")).generate(torch.zeros(1, 4).long(), attention_mask=torch.zeros(1, 4).long())


def test_stop_strings_use_the_models_tokenizer() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    lm = RetroLM(tiny_model("llama", vocab_size=600), tokenizer, config=RetroConfig(kv_budget=128, page_size=W))
    out = lm.generate(random_ids(40)[None], max_new_tokens=30, do_sample=False)[0, 40:].tolist()
    stop = tokenizer.decode(out[4:6])
    stopped = lm.generate(random_ids(40)[None], max_new_tokens=30, do_sample=False, stop_strings=[stop])[
        0, 40:
    ].tolist()
    assert len(stopped) < 30 and stopped == out[: len(stopped)] and stop in tokenizer.decode(stopped)


def test_a_generation_config_is_honoured() -> None:
    config = GenerationConfig(num_beams=3, eos_token_id=list(range(2, 20)), repetition_penalty=1.3)
    found, expected = both(tiny_model("llama"), random_ids(40)[None], generation_config=config, max_new_tokens=12)
    assert found.tolist() == expected.tolist()


def test_unused_criteria_do_not_disturb() -> None:
    model = tiny_model("llama")
    found, expected = both(
        model, random_ids(30)[None], max_new_tokens=5, stopping_criteria=[StopAt(100)], do_sample=False
    )
    assert found.tolist() == expected.tolist()
