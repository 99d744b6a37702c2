"""The examples in docs/add_a_method.md do what the page says; commands and methods that pages name exist."""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from retrolm.cli.known_methods import known_methods
from retrolm.cli.main import build_app
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.methods import METHODS
from tiny_models import random_ids, stock_logits, tiny_model

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def documented() -> Iterator[None]:
    """The methods of the page, registered for one test."""
    text = (DOCS / "add_a_method.md").read_text(encoding="utf-8")
    before = dict(METHODS._entries)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        module = types.ModuleType("documented_method")
        sys.modules[module.__name__] = module  # where dataclasses look up their module
        exec(compile(code, "add_a_method.md", "exec"), vars(module))
    yield
    sys.modules.pop("documented_method", None)
    METHODS._entries.clear()
    METHODS._entries.update(before)


@pytest.mark.parametrize("name", ["key_norm", "strided"])
def test_the_documented_methods_select_within_the_budget(documented: None, name: str) -> None:
    model, ids = tiny_model("llama"), random_ids(100)
    lm = RetroLM(model, config=RetroConfig(kv_budget=32, page_size=8), method=name)
    recent = RetroLM(model, config=RetroConfig(kv_budget=32, page_size=8), method="recency")
    assert lm.logits(ids).shape[0] == 100
    assert not torch.equal(lm.logits(ids), recent.logits(ids))
    prompt = Prompt((), tuple(ids[:90].tolist()), tuple(ids[90:].tolist()))
    (answer,) = lm.answer([prompt], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert 16 < answer.attended_tokens["prefill"] <= 32
    assert METHODS.get(name).describe()["name"] == name


def test_the_documented_token_method_is_exact_where_it_says(documented: None) -> None:
    model, ids = tiny_model("llama"), random_ids(60)
    lm = RetroLM(model, config=RetroConfig(kv_budget=128, page_size=8), method="strided")
    assert (lm.logits(ids) - stock_logits(model, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["key_norm", "strided"])
def test_the_documented_methods_answer_in_a_batch_as_alone(documented: None, name: str) -> None:
    model = tiny_model("llama")
    lm = RetroLM(model, config=RetroConfig(kv_budget=48, page_size=8), method=name)
    texts = [random_ids(num_tokens).tolist() for num_tokens in (160, 105, 139)]
    prompts = [Prompt((), tuple(ids[:-10]), tuple(ids[-10:])) for ids in texts]
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    together = lm.answer(prompts, **settings)
    alone = [lm.answer([prompt], **settings)[0] for prompt in prompts]
    assert [(a.token_ids, a.attended_tokens) for a in together] == [(a.token_ids, a.attended_tokens) for a in alone]


def test_the_documented_methods_say_their_place(documented: None) -> None:
    assert all(
        METHODS.get(name).index != "none" and METHODS.get(name).when != "never" for name in ("key_norm", "strided")
    )


def test_documented_methods_are_short() -> None:
    text = (DOCS / "add_a_method.md").read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        assert len([line for line in code.splitlines() if line.strip()]) <= 30


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


PAGES = [*sorted(DOCS.glob("*.md")), *sorted(DOCS.parent.glob("*.md")), DOCS.parent / "results" / "README.md"]


def commands(page: Path) -> list[list[str]]:
    """The words of each `retrolm` command in a page's shell examples, without comments."""
    shell = "".join(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    lines = shell.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("retrolm ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_and_options_exist(page: Path) -> None:
    for words in commands(page):
        command: Any = typer.main.get_command(build_app(words[0]))
        names = iter(words)
        while subcommands := getattr(command, "commands", None):
            name = next(names, "")
            if name not in subcommands:
                assert name.startswith("-") and command.invoke_without_command, words
                break
            command = subcommands[name]
        known = {option for parameter in command.params for option in parameter.opts}
        assert known.issuperset(word for word in words if word.startswith("--")), words


def test_the_front_page_names_commands_and_methods() -> None:
    assert len(commands(DOCS.parent / "README.md")) > 10
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| kind | methods |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", table)
    assert len(named) > 20 and set(named) <= set(known_methods())
