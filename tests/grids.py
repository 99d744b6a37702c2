"""Grids of parameters: a covering part runs in `make test`, the rest of the full product in `make test-slow`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

Cell = tuple[int, ...]


def pairs(*axes: Sequence[Any]) -> list[Any]:
    """The full product of `axes`, of which those run quickly that together hold every pair of values of two axes."""
    missing = {
        ((one, a), (other, b))
        for one, other in itertools.combinations(range(len(axes)), 2)
        for a in range(len(axes[one]))
        for b in range(len(axes[other]))
    }
    cells, chosen = list(itertools.product(*map(range, map(len, axes)))), set()
    while missing:
        best = max(cells, key=lambda cell: len(missing & _pairs_of(cell)))
        chosen.add(best)
        missing -= _pairs_of(best)
    return _marked(axes, lambda cell: cell in chosen)


def some(ones: Sequence[Any], others: Sequence[Any], each: int) -> list[Any]:
    """The full product of two axes, of which each of `ones` runs quickly with `each` of `others`, taken in turn."""
    return _marked((ones, others), lambda cell: (cell[1] - cell[0] * each) % len(others) < each)


def _pairs_of(cell: Cell) -> set[Any]:
    return set(itertools.combinations(enumerate(cell), 2))


def _marked(axes: Sequence[Sequence[Any]], is_quick: Callable[[Cell], bool]) -> list[Any]:
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, cell, strict=True)), marks=() if is_quick(cell) else pytest.mark.slow
        )
        for cell in itertools.product(*(range(len(axis)) for axis in axes))
    ]
