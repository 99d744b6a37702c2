"""RULER's variable tracking: a chain of assignments scattered over noise, after one worked example."""

from __future__ import annotations

import itertools
import random
import string
from typing import Any

from ..fit import largest_fitting
from ..generator import Draft, Generator, find_spans, split_template
from ..prompt import TokenCounter, Tokenizer
from .needles import NOISE

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the "
    "value {query}, they are: "
)
NUM_HOPS = 4
EXAMPLE_TOKENS = 500
EXAMPLE_STEP = 5


class TrackingGenerator(Generator):
    """One chain of five variables among `size` lines of noise; the example has three-letter names."""

    step = 10

    def __init__(self, tokenizer: Tokenizer, max_new_tokens: int) -> None:
        self._example_size = _example_size(tokenizer, EXAMPLE_TOKENS - max_new_tokens)

    def smallest(self, index: int) -> int:
        """See `Generator`: one line for each assignment."""
        return NUM_HOPS + 1

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        return {"example_lines": self._example_size}

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        example = _task(self._example_size, 3, rng)
        task = _task(size, 5, rng)
        shown = (
            example.context + example.question + example.answer_prefix + " " + " ".join(example.answers) + "\n\n\n\n"
        )
        task.gold_spans = [(start + len(shown), end + len(shown)) for start, end in task.gold_spans]
        task.context = shown + task.context
        return task


def _task(size: int, name_length: int, rng: random.Random) -> Draft:
    names = _names(name_length, rng)
    value = str(rng.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
    lines = [NOISE] * size
    for shift, (place, statement) in enumerate(zip(sorted(rng.sample(range(size), len(chain))), chain, strict=True)):
        lines.insert(place + shift, statement)
    context, question = split_template(TEMPLATE, "\n".join(lines), query=value)
    prefix = PREFIX.format(num_v=len(names), query=value)
    return Draft(context, question, prefix, names, find_spans(context, chain))


def _names(length: int, rng: random.Random) -> list[str]:
    names: list[str] = []
    while len(names) < NUM_HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=length))
        if name not in names:
            names.append(name)
    return names


def _example_size(tokenizer: Tokenizer, max_tokens: int) -> int:
    """Most lines of noise, in steps of five, with which the example stays within its tokens."""
    counter = TokenCounter(tokenizer)

    def tokens_of(size: int) -> int:
        task = _task(size, 3, random.Random(0))
        return counter.exact(task.context + task.question + task.answer_prefix)

    fitting = largest_fitting(tokens_of, max_tokens, NUM_HOPS + 1)
    return max(fitting // EXAMPLE_STEP * EXAMPLE_STEP, NUM_HOPS + 1)
