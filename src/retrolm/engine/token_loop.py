"""Which token methods have a step of fixed shape, and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..methods.first_and_recent import FirstAndRecent
from ..methods.token_base import TokenMethod
from ..methods.token_pages import PagedTokenMethod
from .backbone import Backbone
from .dense_decode import places_for_prompt
from .fast_decode import Runner
from .paged_decode import PagedRunners
from .ring_decode import RingRunners, ring_obstacle


def step_obstacle(backbone: Backbone, method: TokenMethod, prompts: Sequence[Sequence[int]]) -> str | None:
    """Why the answers to these prompts have no step of fixed shape, or None."""
    if not isinstance(method, PagedTokenMethod | FirstAndRecent):
        return f"no step of fixed shape for {method.name}"
    if any(info.window is not None for info in backbone.layers):
        return "sliding layers"
    return ring_obstacle(method, prompts) if isinstance(method, FirstAndRecent) else None


def runners_of(
    method: TokenMethod, kv_budget: int, longest: int, num_tokens: int
) -> tuple[Callable[[Backbone, int, int], Runner], int]:
    """What builds the runner for a method without an obstacle, and the places that its cache needs.

    Args:
        longest: tokens of the longest prompt. num_tokens: to generate.
    """
    if isinstance(method, FirstAndRecent):
        return RingRunners(method, kv_budget), places_for_prompt(min(longest, kv_budget) + num_tokens)
    assert isinstance(method, PagedTokenMethod)
    return PagedRunners(method, kv_budget), places_for_prompt(longest + num_tokens)
