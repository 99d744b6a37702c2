"""Transformers' text-generation pipeline over RetroLM gives what the stock pipeline gives, on a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from tiny_models import EOS, tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

PROMPT = "The captain, who had seen worse nights, walked to"


def tokenizer() -> PreTrainedTokenizerFast:
    found = tiny_tokenizer()
    found.pad_token_id = EOS
    return found


def make(budget: int) -> RetroLM:
    model = tiny_model("llama", vocab_size=600)
    return RetroLM(model, tokenizer(), config=RetroConfig(kv_budget=budget, page_size=8))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 9, "do_sample": False},
        {"max_new_tokens": 9, "do_sample": True, "temperature": 1.3, "num_return_sequences": 2},
        {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "return_full_text": False},
        {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=False)},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "Nobody"], [{"role": "user", "content": PROMPT}]], ids=type)
def test_equals_the_stock_pipeline_within_the_budget(prompt: Any, options: dict[str, Any]) -> None:
    lm = make(160)
    torch.manual_seed(0)
    found = lm.pipeline()(prompt, **options)
    torch.manual_seed(0)
    assert found == pipeline("text-generation", model=lm.model, tokenizer=tokenizer())(prompt, **options)


def test_batches() -> None:
    lm = make(160)
    prompts = [PROMPT, "Nobody spoke. " * 5, "There"]
    ask = lm.pipeline(max_new_tokens=7, do_sample=False, batch_size=3)
    assert ask(prompts) == [lm.pipeline(max_new_tokens=7, do_sample=False)(prompt) for prompt in prompts]


def test_prompts_longer_than_the_budget() -> None:
    lm = make(64)
    text = STORY * 3
    found = lm.pipeline(do_sample=False, max_new_tokens=6, return_full_text=False)(text)[0]["generated_text"]
    ids = torch.tensor(lm.tokenizer(text)["input_ids"])
    expected = lm.generate(ids[None], max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert found == lm.tokenizer.decode(expected, skip_special_tokens=True)


def test_what_it_lacks() -> None:
    with pytest.raises(UserError, match="no tokens"):
        make(64).pipeline(max_new_tokens=3)("")
    with pytest.raises(UserError, match="tokenizer"):
        RetroLM(tiny_model("llama"), config=RetroConfig(kv_budget=64, page_size=8)).pipeline()
    assert "OnBudget" in repr(make(64).pipeline())
