"""Training wordings keep away from evaluation wordings: never four words in a row in common."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import random
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import retrolm.evaluation
from retrolm.engine.prompts import QUESTION_TEMPLATE
from retrolm.training.data import (
    chains,
    composed,
    fact_wordings,
    frames,
    passage_queries,
    question_rules,
    quoted,
    registers,
    transcripts,
    turns,
)
from retrolm.training.data.fact_wordings import FORMS, draw_wording
from retrolm.training.data.wordings import attributes, held_out, questions, specific, statements
from retrolm.training.data.wordings.forms import Forms
from retrolm.training.stage2 import asking

TRAINING_MODULES = (
    chains,
    composed,
    fact_wordings,
    frames,
    passage_queries,
    question_rules,
    quoted,
    registers,
    transcripts,
    turns,
    asking,
)
SHARED_WORDS = 4
NEEDLE = "One of the special magic numbers for {key} is: {value}."
# Frames around a question, not wordings of facts or questions: the paper's own and the engine's own.
FRAMES_OF_THE_PRODUCT = {frames.PAPER_INSTRUCTION, frames.PAPER_QUESTION, QUESTION_TEMPLATE}


def strings(value: Any) -> Iterator[str]:
    """Yield all strings within constants: tuples, lists, dictionaries and dataclass instances."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings([*value.keys(), *value.values()])
    elif isinstance(value, tuple | list | set | frozenset):
        for item in value:
            yield from strings(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from strings([getattr(value, entry.name) for entry in dataclasses.fields(value)])


def wordings(module: ModuleType) -> Iterator[str]:
    """Yield the strings among a module's constants."""
    for name, value in vars(module).items():
        if not name.startswith("__"):
            yield from strings(value)


def sequences(template: str) -> set[tuple[str, ...]]:
    """Return all runs of four words of a template; places such as {key} break a run."""
    found: set[tuple[str, ...]] = set()
    for segment in re.split(r"\{[^}]*\}", template.lower()):
        words = re.findall(r"[a-z0-9]+(?:'[a-z]+)?", segment)
        found |= {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}
    return found


def evaluation_templates() -> set[str]:
    """Return the strings among the constants of all evaluation modules."""
    package = retrolm.evaluation
    names = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    found = {text for name in names for text in wordings(importlib.import_module(name))}
    filled = {text.replace("{kind}", kind) for text in found for kind in ("numbers", "number", "words", "uuids")}
    return (found | filled) - FRAMES_OF_THE_PRODUCT


def training_templates() -> set[str]:
    """Return the strings among the constants of the sample builders, and wordings with their attribute filled in."""
    found = {text for module in TRAINING_MODULES for text in wordings(module)}
    return (found | {text for forms in FORMS.values() for text in filled(forms)}) - FRAMES_OF_THE_PRODUCT


def filled(forms: Forms) -> Iterator[str]:
    """Yield every form about every attribute, with and without modifiers."""
    about = (forms.statements, forms.lines, forms.questions, forms.answers, forms.reverse, forms.headings)
    names = {modifier + attribute.name for attribute in forms.attributes for modifier in forms.modifiers}
    for form in (form for group in about for form in group if "{attribute}" in form):
        yield from (form.replace("{attribute}", name) for name in names)


def test_no_training_template_shares_four_words_with_an_evaluation_template() -> None:
    held_out = {run: text for text in evaluation_templates() for run in sequences(text)}
    assert len(held_out) > 50
    shared = [
        (" ".join(run), text, held_out[run])
        for text in sorted(training_templates())
        for run in sequences(text)
        if run in held_out
    ]
    assert not shared


def test_the_needle_is_among_the_evaluation_templates() -> None:
    assert sequences(NEEDLE) <= {run for text in evaluation_templates() for run in sequences(text)}


def test_the_search_sees_all_training_wordings() -> None:
    found = training_templates()
    for text in ("The {attribute} of {key} is {value}.", "the mayor of {a}", "{a} And {b}", "who is {s} married to"):
        assert text in found
    for module in (attributes, specific, statements, held_out, questions):
        assert set(wordings(module)) <= found
    assert len(found) > 20_000


def test_there_are_many_wordings_to_train_on() -> None:
    train, dev = FORMS["train"], FORMS["dev"]
    assert len(set(train.statements)) >= 78 and len(set(train.questions)) >= 51 and len(set(train.lines)) >= 24
    assert len(train.specific) >= 27 and len({a.name for a in train.attributes}) >= 50
    assert len(dev.statements) >= 10 and len(dev.specific) >= 6


def test_paraphrases_share_no_telling_word_with_what_is_stated() -> None:
    """Those of attributes never name the attribute; the question's key is all that leads to the fact."""
    for forms in FORMS.values():
        for attribute in forms.attributes:
            for question in attribute.paraphrases:
                assert "{key}" in question and not set(attribute.name.split()) & set(question.lower().split()), question


@pytest.mark.parametrize("wording", ["Note one of the special magic words here", "the special magic numbers of {key}"])
def test_a_copied_wording_would_be_found(wording: str) -> None:
    held_out = {run for text in evaluation_templates() for run in sequences(text)} | sequences(NEEDLE)
    assert sequences(wording) & held_out


def test_the_dev_split_has_wordings_of_its_own() -> None:
    """No statement, question, line or attribute of one split is one of the other's, nor four words of it in a row."""

    def of(forms: Forms) -> set[str]:
        return {text for text in strings(forms) if (" " in text and "{" in text) or "[" in text}

    train, dev = (of(FORMS[split]) for split in ("train", "dev"))
    assert len(dev) > 20 and not train & dev
    assert not {a.name for a in FORMS["train"].attributes} & {a.name for a in FORMS["dev"].attributes}
    told = {run for text in train for run in sequences(text)}
    assert not [text for text in dev if sequences(text) & told]
    for split in FORMS:
        drawn = {text for seed in range(300) for text in draw_wording(random.Random(seed), split).questions}
        others = {text for seed in range(300) for text in draw_wording(random.Random(seed)).questions}
        assert bool(drawn & others) == (split == "train")
