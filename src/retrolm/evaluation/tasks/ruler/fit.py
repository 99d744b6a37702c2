"""Filling a length: how many units of haystack fit into a number of tokens (RULER's binary search)."""

from __future__ import annotations

import random
from collections.abc import Callable

from ....errors import UserError
from ..prompt import TokenCounter, Tokenizer, render
from .draft import Draft, Generator

_INTERPOLATIONS = 16


def largest_fitting(tokens_of: Callable[[int], float], budget: float, smallest: int) -> int:
    """Largest size whose tokens stay within the budget, for a count that grows with size; at least `smallest`.

    Guesses by the slope so far, and by halves if that doesn't end; a benchmark's binary search finds the same size.
    """
    low, low_tokens = smallest, tokens_of(smallest)
    if low_tokens > budget:
        return smallest
    high, high_tokens = smallest, low_tokens
    while high_tokens <= budget:
        low, low_tokens = high, high_tokens
        high = 2 * high + 1
        high_tokens = tokens_of(high)
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
        self, generator: Generator, tokenizer: Tokenizer, length: int, max_new_tokens: int, seed_name: str
    ) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self._counter = TokenCounter(tokenizer)
        self._length = length
        self._budget = length - max_new_tokens
        self._seed_name = seed_name

    def sample(self, index: int, size: int) -> tuple[Draft, int]:
        """Make sample `index` with `size` units, or fewer if it is too long; returns it with its number of tokens.

        Raises `UserError` if not even the smallest one fits.
        """
        smallest = self._generator.smallest(index)
        size = max(size, smallest)
        while True:
            draft = self._draft(index, size)
            tokens = self._counter.exact(self._text(draft))
            if tokens <= self._budget:
                return draft, tokens
            if size == smallest:
                raise UserError(
                    f"{self._length} tokens are too few: the smallest prompt of sample {index} takes {tokens}, and "
                    f"{self._length - self._budget} are kept for the answer. "
                    f"Ask for a length of at least {tokens + self._length - self._budget}."
                )
            size = max(size - self._generator.step, smallest)

    def size(self) -> int:
        """Largest size at which sample 0 fits."""
        smallest = self._generator.smallest(0)
        size = largest_fitting(lambda units: self._estimate(units), self._budget, smallest)
        text = self._text(self._draft(0, size))
        ratio = self._counter.estimate(text) / self._counter.exact(text)
        return largest_fitting(lambda units: self._estimate(units), self._budget * ratio, smallest)

    def _estimate(self, size: int) -> int:
        return self._counter.estimate(self._text(self._draft(0, size)))

    def _draft(self, index: int, size: int) -> Draft:
        return self._generator.draft(size, index, random.Random(f"{self._seed_name}/{index}"))

    def _text(self, draft: Draft) -> str:
        return render(self._tokenizer, draft.context + draft.question, draft.answer_prefix)
