"""Answers of methods that choose pages for each generated token, by the engine's own loop over a `PagedCache`."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods.retro_exposure import Revises
from ..methods.token_pages import PagedTokenMethod
from .backbone import Backbone
from .fast_decode import Runner
from .paged_cache import PagedCache
from .paged_step import PagedProgram, paged_step


@dataclass(frozen=True)
class PagedRunners:
    """Builds runners of one method and budget; two of the same build the same.

    Attributes:
        fused: fused layers wherever the model has them.
    """

    method: PagedTokenMethod
    kv_budget: int
    fused: bool = True

    def __call__(self, backbone: Backbone, batch: int, places: int) -> Runner:
        """See `DecodeRequest.runners`."""
        cache = PagedCache(backbone, self.method, batch, places)
        program = PagedProgram(cache, self.kv_budget)
        return Runner(backbone, cache, program, paged_step(backbone, cache, program, self.fused))


def note_exposure(cache: PagedCache) -> None:
    """Tell the method's meter, if there is one, what all steps have let queries see."""
    method = cache.method
    if not isinstance(method, Revises) or method.meter is None:
        return
    for layer in cache.layers[method.knobs.num_dense_layers :]:
        fresh = layer.state.fresh_BJQ
        method.meter.note((layer.tally.sums_BHQ if fresh is None else fresh).clone())
