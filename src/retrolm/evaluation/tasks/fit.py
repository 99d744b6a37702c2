"""Filling a length: how many units of haystack fit into a number of tokens (RULER's binary search)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from ...errors import UserError
from .generator import Draft, Generator
from .prompt import TokenCounter, Tokenizer, render

_INTERPOLATIONS = 16
_FILLED = 0.9


class TooLongError(UserError):
    """A sample can't be made as short as asked for; it needs a length of `needed` tokens."""

    def __init__(self, task: str, length: int, prompt_tokens: int, answer_tokens: int) -> None:
        self.needed = prompt_tokens + answer_tokens
        super().__init__(
            f"{task}: {length} tokens are too few: the smallest prompt takes {prompt_tokens}, and {answer_tokens} are "
            f"kept for the answer. Ask for a length of at least {self.needed}."
        )


def largest_fitting(
    tokens_of: Callable[[int], float], budget: float, smallest: int, largest: int | None = None, guess: int = 1
) -> int:
    """Largest size whose tokens stay within the budget, for a count that grows with size; at least `smallest`.

    Starts from `guess`, goes on by the slope so far, and by halves if that doesn't end. A benchmark's binary search
    finds the same size.
    """
    low = _Probe(smallest, tokens_of(smallest))
    if low.tokens > budget:
        return smallest
    low, high = _bracket(tokens_of, budget, low, largest, guess)
    for number in range(high.size if high else 0):
        assert high is not None
        if high.size - low.size <= 1:
            break
        size = low.size + int((budget - low.tokens) * (high.size - low.size) / (high.tokens - low.tokens))
        size = (low.size + high.size) // 2 if number > _INTERPOLATIONS else size
        size = min(max(size, low.size + 1), high.size - 1)
        probe = _Probe(size, tokens_of(size))
        low, high = (probe, high) if probe.tokens <= budget else (low, probe)
    return low.size


class _Probe(NamedTuple):
    size: int
    tokens: float


def _bracket(
    tokens_of: Callable[[int], float], budget: float, low: _Probe, largest: int | None, guess: int
) -> tuple[_Probe, _Probe | None]:
    """Return a size that fits and one that doesn't; `None` for the latter if even `largest` fits."""
    size = max(guess, low.size + 1)
    while low.size != largest:
        size = size if largest is None else min(size, largest)
        probe = _Probe(size, tokens_of(size))
        if probe.tokens > budget:
            return low, probe
        growth = max((probe.tokens - low.tokens) / (probe.size - low.size), 1e-3)
        size = probe.size + min(int(1.02 * (budget - probe.tokens) / growth) + 1, 4 * probe.size + 4)
        low = probe
    return low, None


class Fitter:
    """Makes samples of one generator that fill `length` tokens: prompt, chat template, prefix and answer together."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        length: int | None,
        max_new_tokens: int,
        task: str,
        seed: int,
        chat: bool = True,
    ) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self._counter = TokenCounter(tokenizer)
        self._length = length
        self._answer_tokens = max_new_tokens
        self._task = task
        self._seed_name = f"{seed}/{task}/{length}"
        self._chat = chat
        self._common_size: int | None = None
        self._guess = 1
        self._ratio: float | None = None  # estimated to exact tokens

    def sample(self, index: int) -> tuple[Draft, int]:
        """Make sample `index`; returns it with the number of its prompt's tokens.

        Raises `TooLongError` if not even the smallest one fits, `UserError` if there isn't enough text to fill the
        length, or no natural length to fall back on.
        """
        if self._length is None:
            draft = self._draft(index, self._natural_size(index))
            return draft, self._counter.exact(self._text(draft))
        if self._generator.fit_each:
            return self._shrunk(index, self._fitting_size(index))
        if self._common_size is None:
            self._common_size = self._fitting_size(0)
        return self._shrunk(index, self._common_size)

    def _shrunk(self, index: int, size: int) -> tuple[Draft, int]:
        """Make the sample with `size` units, and fewer as long as it is too long."""
        assert self._length is not None
        smallest = self._generator.smallest(index)
        size = max(size, smallest)
        while True:
            draft = self._draft(index, size)
            tokens = self._counter.exact(self._text(draft))
            if tokens + self._answer_tokens <= self._length:
                self._check_filled(index, size, tokens)
                return draft, tokens
            if size == smallest:
                raise TooLongError(self._task, self._length, tokens, self._answer_tokens)
            size = max(size - self._generator.step, smallest)

    def _fitting_size(self, index: int) -> int:
        """Largest size at which the sample fits, by estimated tokens that are calibrated once."""
        assert self._length is not None
        limits = self._generator.smallest(index), self._generator.largest(index)
        if limits[0] == limits[1]:
            return limits[0]
        budget = self._length - self._answer_tokens
        if self._ratio is None:
            self._guess = self._search(index, budget, limits)
            text = self._text(self._draft(index, self._guess))
            self._ratio = self._counter.estimate(text) / self._counter.exact(text)
        self._guess = self._search(index, budget * self._ratio, limits)
        return self._guess

    def _search(self, index: int, budget: float, limits: tuple[int, int | None]) -> int:
        return largest_fitting(lambda size: self._estimate(index, size), budget, *limits, guess=self._guess)

    def _natural_size(self, index: int) -> int:
        size = self._generator.natural_size(index)
        if size is None:
            raise UserError(f"{self._task} is generated to a length: ask for one in tokens, such as 4096.")
        return size

    def _check_filled(self, index: int, size: int, tokens: int) -> None:
        used = tokens + self._answer_tokens
        if self._generator.fills and size == self._generator.largest(index) and used < _FILLED * (self._length or 0):
            raise UserError(
                f"{self._task}: the texts at hand fill {used} of {self._length} tokens. Ask for a length of at most "
                f"{used}, or give a data folder with more text."
            )

    def _estimate(self, index: int, size: int) -> int:
        return self._counter.estimate(self._text(self._draft(index, size)))

    def _draft(self, index: int, size: int) -> Draft:
        return self._generator.draft(size, index, random.Random(f"{self._seed_name}/{index}"))

    def _text(self, draft: Draft) -> str:
        return render(self._tokenizer, draft.context + draft.question, draft.answer_prefix, self._chat)
