"""What attaching changes, and that nothing is left of it."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import retrolm
from retrolm.config import RetroConfig
from retrolm.engine.attachment import Attachment
from retrolm.engine.backbone import Backbone
from retrolm.engine.document import Document
from retrolm.engine.model import RetroLM
from retrolm.errors import UnsupportedModelError
from tiny_models import random_ids, stock_logits, tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

W = 8
IDS = random_ids(70)


def attach(model: Any, budget: int = 48, **options: Any) -> RetroLM:
    return RetroLM(model, config=RetroConfig(kv_budget=budget, page_size=W, **options))


def traces(model: Any) -> list[Any]:
    """Everything that attaching could leave behind in a model's modules."""
    config = model.config._attn_implementation
    return [config] + [
        (name, type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "gemma3"])
def test_detaching_leaves_the_model_bit_identical(name: str) -> None:
    model = tiny_model(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before, logits = traces(model), stock_logits(model, IDS)
    lm = attach(model)
    assert traces(model) != before
    lm.logits(IDS)
    lm.generate(IDS[None], max_new_tokens=4)
    lm.detach()
    lm.detach()
    assert [trace for trace in traces(model) if "rotary" not in str(trace)] == [
        trace for trace in before if "rotary" not in str(trace)
    ]
    assert {key: value.tolist() for key, value in model.state_dict().items()} == {
        key: value.tolist() for key, value in weights.items()
    }
    assert torch.equal(stock_logits(model, IDS), logits)


@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "gemma2", "llama-dynamic"])
def test_the_attached_model_is_the_stock_model_while_nothing_runs(name: str) -> None:
    model = tiny_model(name)
    logits = stock_logits(model, IDS)
    tokens = model.generate(IDS[None], max_new_tokens=8, do_sample=False, pad_token_id=1)
    lm = attach(model)
    lm.logits(IDS)
    assert torch.equal(stock_logits(model, IDS), logits)
    assert torch.equal(model.generate(IDS[None], max_new_tokens=8, do_sample=False, pad_token_id=1), tokens)


def test_weights_may_change_while_attached() -> None:
    """Hooks stand on modules, not on weights: an adapter merged later is part of what runs."""
    model = tiny_model("llama")
    lm = attach(model, 96)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.5)
    assert torch.equal(lm.logits(IDS), stock_logits(model, IDS))


FRESH = """
import sys, retrolm
print([m for m in ("torch", "transformers") if m in sys.modules], retrolm.__version__)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known
before = set(known.valid_keys())
import retrolm.engine.model
print(set(known.valid_keys()) == before)
"""


def test_importing_changes_nothing_global_and_needs_no_torch() -> None:
    """The package in a fresh process without torch; the engine, which needs it, registers nothing."""
    out = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["[]", retrolm.__version__, "True"]


def test_names_of_the_package_are_loaded_when_used() -> None:
    assert retrolm.RetroLM is RetroLM and retrolm.RetroConfig is RetroConfig
    assert set(retrolm.__all__) <= set(dir(retrolm))
    for name in retrolm.__all__:
        assert getattr(retrolm, name) is not None
    with pytest.raises(AttributeError, match="RetroLLM"):
        _ = retrolm.RetroLLM


def test_two_engines_on_one_model() -> None:
    """Each with its own retriever: the hooks of the one stay out of the other's passes."""
    from test_against_naive import random_retriever

    expected = []
    for seed in (1, 2):
        lm = attach(tiny_model("llama"))
        lm.use_retriever(random_retriever(lm, 0, seed))
        expected.append(lm.logits(IDS))
    model = tiny_model("llama")
    engines = [attach(model), attach(model)]
    for seed, lm in zip((1, 2), engines, strict=True):
        lm.use_retriever(random_retriever(lm, 0, seed))
    assert not torch.equal(*expected)
    for lm, logits in zip(engines, expected, strict=True):
        assert torch.equal(lm.logits(IDS), logits)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            found = list(pool.map(lambda lm: lm.logits(IDS), engines))
            assert all(map(torch.equal, found, expected))
    engines[0].detach()
    assert torch.equal(engines[1].logits(IDS), expected[1])


def test_threads_share_an_engine_and_its_documents() -> None:
    model = tiny_model("llama", vocab_size=600)
    lm = RetroLM(model, tiny_tokenizer(), config=RetroConfig(kv_budget=96, page_size=W))
    documents = lm.read([STORY, STORY[50:250]])
    questions = [f"What is {word}?" for word in ("it", "the grass", "the ship", "a lamp", "12", "yellow")]
    pairs = [(document, question) for document in documents for question in questions]

    def answer(pair: tuple[Document, str]) -> tuple[int, ...]:
        return pair[0].ask(pair[1], max_new_tokens=6, do_sample=False).token_ids

    expected = [answer(pair) for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, pairs * 3)) == expected * 3


def test_stock_passes_beside_a_running_engine_never_give_wrong_numbers() -> None:
    """Another thread's stock pass is right, or is refused; RetroLM's own are always right."""
    model = tiny_model("llama")
    lm, logits = attach(model), stock_logits(model, IDS)
    expected = lm.logits(IDS)
    done, wrong = threading.Event(), []

    def stock() -> None:
        while not done.is_set():
            try:
                if not torch.equal(stock_logits(model, IDS), logits):
                    wrong.append("numbers")
            except RuntimeError as error:
                if "RetroLM" not in str(error):
                    wrong.append(str(error))

    thread = threading.Thread(target=stock)
    thread.start()
    results = [lm.logits(IDS) for _ in range(20)]
    done.set()
    thread.join()
    assert not wrong
    assert all(torch.equal(result, expected) for result in results)


def test_passes_run_one_at_a_time() -> None:
    backbone = Backbone(tiny_model("llama"), 64)
    one, two = Attachment(backbone), Attachment(backbone)
    program: Any = object()
    entered = threading.Event()

    def other() -> None:
        with two.run(program):
            entered.set()

    thread = threading.Thread(target=other)
    with one.run(program):
        thread.start()
        assert not entered.wait(0.2)
    thread.join()
    assert entered.is_set()


class TestUnsupported:
    def test_family(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
        with pytest.raises(UnsupportedModelError, match=r"'gpt2' are not supported\. Supported: .*llama"):
            attach(model)

    def test_projections(self) -> None:
        model = tiny_model("llama")
        attention = model.model.layers[2].self_attn
        attention.query = attention.q_proj
        del attention.q_proj
        with pytest.raises(UnsupportedModelError, match=r"Layer 2 .* q_proj"):
            attach(model)

    def test_rope_type(self) -> None:
        model = tiny_model("llama")
        model.config.rope_parameters["rope_type"] = "proportional"
        with pytest.raises(UnsupportedModelError, match=r"'proportional' is not supported\. Supported: default"):
            attach(model)

    def test_interleaved_rotation(self) -> None:
        model = tiny_model("llama")
        model.model.rotary_emb = Interleaved(model.model.rotary_emb)
        with pytest.raises(UnsupportedModelError, match="half-split"):
            attach(model)

    def test_angles_that_do_not_grow_with_the_position(self) -> None:
        model = tiny_model("llama")
        model.model.rotary_emb = Squared(model.model.rotary_emb)
        with pytest.raises(UnsupportedModelError, match="position embedding"):
            attach(model)


class Interleaved(nn.Module):
    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, x: Any, position_ids: Any) -> Any:
        halves = (part[..., : part.shape[-1] // 2] for part in self.stock(x, position_ids))
        return tuple(half.repeat_interleave(2, -1) for half in halves)


class Squared(Interleaved):
    def forward(self, x: Any, position_ids: Any) -> Any:
        return self.stock(x, position_ids**2)
