"""What every registered method must do, whatever its kind: say what it is, be exact where it says so, keep its budget,
leave nothing behind."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import retrolm
from grids import some
from landmark_maker import random_landmarks
from retrolm.cli.known_methods import known_methods
from retrolm.config import RetroConfig
from retrolm.engine.answering import PROGRAMS, Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.results import Answer
from retrolm.errors import UserError
from retrolm.methods import Method
from tiny_eval import story_sample
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

METHODS = known_methods()
NAMES = [name for name in METHODS if "embedder" not in METHODS.get(name).describe()["knobs"]]
WEIGHTS = [name for name in NAMES if "weights" in METHODS.get(name).describe()["knobs"]]  # trained for each model
STOCK = [name for name in NAMES if name not in WEIGHTS]  # with room for everything they are the stock model
BUDGETED = [name for name in NAMES if METHODS.get(name).has_budget]
FAMILIES = ["llama", "qwen2", "gemma3"]
NEW = 5


def engine(name: str, family: str = "llama", kv_budget: int = 96, **knobs: Any) -> RetroLM:
    model = tiny_model(family, vocab_size=600, dtype=torch.float64)
    return attach(model, name, kv_budget, **knobs)


def attach(model: Any, name: str, kv_budget: int = 96, **knobs: Any) -> RetroLM:
    if METHODS.get(name).kind == "rag":
        knobs = {"chunk_tokens": 12, "num_chunks": 40, **knobs}
    if name in WEIGHTS:
        knobs = {"weights": str(random_landmarks(model, num_between=8)), **knobs}
    config = RetroConfig(kv_budget=kv_budget, page_size=8)
    return RetroLM(model, tiny_tokenizer(), config=config, method=name, method_options=knobs)


def prompt_of(number: int, num_chars: int = 420) -> Prompt:
    """A prompt of about 100 (420 letters) tokens: head, text, question."""
    sample, tokenizer = story_sample(number, num_chars), tiny_tokenizer()
    ids = [tuple(tokenizer(text)["input_ids"]) for text in ("<s>", sample.context, sample.question)]
    return Prompt(ids[0], ids[1], ids[2], sample.context, sample.question)


def ask(lm: RetroLM, prompts: list[Prompt]) -> list[Answer]:
    return lm.answer(prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=None)


def facts(answer: Answer) -> tuple[Any, ...]:
    return answer.token_ids, answer.attended_tokens, answer.attended_by_layer, answer.text


def own_facts(answer: Answer) -> tuple[Any, ...]:
    """As `facts`; documents that were read together share what the longest reading attended."""
    return answer.token_ids, answer.attended_tokens["decode"], answer.attended_by_layer, answer.text


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_says_what_it_is(name: str) -> None:
    kind = METHODS.get(name)
    found = kind.describe()
    assert found["name"] == name and found["paper"].startswith("https://")
    assert all(found[key].strip() for key in ("summary", "budget_split", "keeps", "positions", "exact_when"))
    assert found["prefill"] in ("streaming", "dense") and kind.kind in PROGRAMS
    assert dataclasses.is_dataclass(kind.Knobs) and kind.Knobs.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "family"), some(STOCK, FAMILIES, each=2))
def test_with_room_for_everything_a_method_is_full_attention(name: str, family: str) -> None:
    """A budget of four times the text is room enough for every split that methods declare as exact.

    Landmark Attention is the model as it was trained for it then: tests/test_landmark.py.
    """
    model = tiny_model(family, vocab_size=600)
    prompts = [prompt_of(0)]
    expected = ask(attach(model, "full"), prompts)[0]
    num_tokens = len(prompts[0].ids)
    found = ask(attach(model, name, kv_budget=min(4 * num_tokens, 512)), prompts)[0]
    assert found.token_ids == expected.token_ids
    assert found.attended_tokens["decode"] == num_tokens + NEW - 1


@pytest.mark.parametrize("name", BUDGETED)
def test_the_budget_is_kept_and_stated(name: str) -> None:
    lm, prompt = engine(name), prompt_of(0, 900)
    (answer,) = ask(lm, [prompt])
    assert len(prompt.ids) > 200
    kind = METHODS.get(name)
    attended = answer.attended_tokens
    assert attended["decode"] <= 96 * (2 if kind.kind == "prune" else 1) + NEW - 1  # PyramidKV: uneven over layers
    assert attended["prefill"] <= 96 if kind.prefill == "streaming" or kind.kind == "rag" else attended["prefill"] > 200
    assert {"device", "host"} <= set(answer.kv_bytes) and answer.kv_bytes["device"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_one_at_a_time_and_nothing_stays(name: str) -> None:
    lm, prompts = engine(name), [prompt_of(number, length) for number, length in enumerate((640, 420, 555))]
    together, alone = ask(lm, prompts), [ask(lm, [prompt])[0] for prompt in prompts]
    assert [own_facts(answer) for answer in together] == [own_facts(answer) for answer in alone]
    assert facts(ask(lm, prompts[:1])[0]) == facts(alone[0])


@pytest.mark.parametrize("name", NAMES)
def test_documents_can_be_asked_and_streamed(name: str) -> None:
    lm = engine(name)
    document = lm.read(story_sample(0, 600).context)
    answer = document.ask("Who spoke?", max_new_tokens=NEW, do_sample=False)
    streamed = "".join(document.stream("Who spoke?", max_new_tokens=NEW, do_sample=False))
    assert streamed.strip() == answer.text
    assert document.num_tokens > 120
    document.close()
    with pytest.raises(UserError, match="closed"):
        document.ask("Who spoke?")


@pytest.mark.parametrize("name", list(METHODS))
def test_unknown_knobs_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"Unknown knob|has no knobs"):
        METHODS.get(name).with_options({"no_such_knob": 1})


@pytest.mark.parametrize(
    "name", [name for name in NAMES if METHODS.get(name).kind in ("tokens", "prune", "landmarks", "dense")]
)
def test_what_needs_pages_says_so(name: str) -> None:
    lm = engine(name)
    document = lm.read(story_sample(0).context)
    for call in (
        document.conversation,
        lambda: document.retrieve("Who?"),
        lambda: lm.generate(torch.ones(1, 9).long()),
    ):
        with pytest.raises(UserError, match="pages"):
            call()


def test_engine_runner_and_command_line_branch_on_no_name() -> None:
    """No string comparison with a method's name outside the method's own room."""
    names = "|".join(re.escape(name) for name in METHODS)
    branch = re.compile(rf"""method(\.name)?\s*(==|!=|in)\s*[(\[{{]?\s*["']({names})["']""")
    rooms = ("engine", "evaluation", "cli", "rag")
    for file in (file for room in rooms for file in (Path(retrolm.__file__).parent / room).rglob("*.py")):
        assert not branch.search(file.read_text(encoding="utf-8")), file


def test_methods_hold_only_their_knobs() -> None:
    for name in STOCK:
        method = METHODS.get(name)()
        assert isinstance(method, Method) and set(vars(method)) <= {"knobs", "_embedder"}, name
