"""What runs the answers of a token method in the engine's own loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..methods.first_and_recent import FirstAndRecent
from ..methods.token_base import TokenMethod
from ..methods.token_pages import PagedTokenMethod
from .backbone import Backbone
from .dense_decode import places_for_prompt
from .fast_decode import Runner
from .paged_decode import PagedRunners
from .ring_decode import RingRunners, ring_fits
from .stream_loop import StreamRunners


def loop_obstacle(backbone: Backbone, method: TokenMethod) -> str | None:
    """Why a method's answers can't be decoded in the loop, or None."""
    slides = any(info.window is not None for info in backbone.layers)
    return "sliding layers" if isinstance(method, PagedTokenMethod) and slides else None


def runners_of(
    backbone: Backbone, method: TokenMethod, kv_budget: int, prompts: Sequence[Sequence[int]], num_tokens: int
) -> tuple[Callable[[Backbone, int, int], Runner], int]:
    """What builds the runner for a method without an obstacle, and the places that its cache needs.

    Args:
        num_tokens: to generate behind each prompt.
    """
    longest = max(map(len, prompts))
    if isinstance(method, PagedTokenMethod):
        return PagedRunners(method, kv_budget), places_for_prompt(longest + num_tokens)
    if isinstance(method, FirstAndRecent) and ring_fits(backbone, method, prompts):
        return RingRunners(method, kv_budget), places_for_prompt(min(longest, kv_budget) + num_tokens)
    return StreamRunners(), 1
