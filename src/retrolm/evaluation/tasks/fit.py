"""Filling a length: how many units of haystack fit into a number of tokens (RULER's binary search)."""

from __future__ import annotations

import random
from collections.abc import Callable

from ...errors import UserError
from .generator import Draft, Generator
from .prompt import TokenCounter, Tokenizer, render

_INTERPOLATIONS = 16
_FILLED = 0.9


class TooLongError(UserError):
    """A sample can't be made as short as asked for."""


def largest_fitting(tokens_of: Callable[[int], float], budget: float, smallest: int, largest: int | None = None) -> int:
    """Largest size whose tokens stay within the budget, for a count that grows with size; at least `smallest`.

    Guesses by the slope so far, and by halves if that doesn't end; a benchmark's binary search finds the same size.
    """
    low, low_tokens = smallest, tokens_of(smallest)
    high, high_tokens = low, low_tokens
    while high_tokens <= budget and high != largest:
        low, low_tokens = high, high_tokens
        high = 2 * high + 1 if largest is None else min(2 * high + 1, largest)
        high_tokens = tokens_of(high)
    if high_tokens <= budget:
        return high
    for probe in range(high):
        if high - low <= 1:
            break
        guess = low + int((budget - low_tokens) * (high - low) / (high_tokens - low_tokens))
        middle = (low + high) // 2 if probe > _INTERPOLATIONS else min(max(guess, low + 1), high - 1)
        tokens = tokens_of(middle)
        if tokens <= budget:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
    return low


class Fitter:
    """Makes samples of one generator that fill `length` tokens: prompt, chat template, prefix and answer together."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        length: int | None,
        max_new_tokens: int,
        seed_name: str,
        chat: bool = True,
    ) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self._counter = TokenCounter(tokenizer)
        self._length = length
        self._answer_tokens = max_new_tokens
        self._seed_name = seed_name
        self._chat = chat
        self._common_size: int | None = None

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
                raise self._too_long(index, tokens)
            size = max(size - self._generator.step, smallest)

    def _fitting_size(self, index: int) -> int:
        """Largest size at which the sample fits, by estimated tokens that are calibrated once."""
        assert self._length is not None
        limits = self._generator.smallest(index), self._generator.largest(index)
        budget = self._length - self._answer_tokens
        size = largest_fitting(lambda units: self._estimate(index, units), budget, *limits)
        text = self._text(self._draft(index, size))
        ratio = self._counter.estimate(text) / self._counter.exact(text)
        return largest_fitting(lambda units: self._estimate(index, units), budget * ratio, *limits)

    def _natural_size(self, index: int) -> int:
        size = self._generator.natural_size(index)
        if size is None:
            raise UserError("This task is generated to a length: ask for one in tokens, such as 4096.")
        return size

    def _check_filled(self, index: int, size: int, tokens: int) -> None:
        used = tokens + self._answer_tokens
        if size == self._generator.largest(index) and used < _FILLED * (self._length or 0):
            raise UserError(
                f"The texts at hand fill {used} of {self._length} tokens. Ask for a length of at most {used}, "
                f"or give a data folder with more text."
            )

    def _too_long(self, index: int, tokens: int) -> TooLongError:
        needed = tokens + self._answer_tokens
        return TooLongError(
            f"{self._length} tokens are too few: the smallest prompt of sample {index} takes {tokens}, and "
            f"{self._answer_tokens} are kept for the answer. Ask for a length of at least {needed}."
        )

    def _estimate(self, index: int, size: int) -> int:
        return self._counter.estimate(self._text(self._draft(index, size)))

    def _draft(self, index: int, size: int) -> Draft:
        return self._generator.draft(size, index, random.Random(f"{self._seed_name}/{index}"))

    def _text(self, draft: Draft) -> str:
        return render(self._tokenizer, draft.context + draft.question, draft.answer_prefix, self._chat)
