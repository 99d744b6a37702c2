"""One step of a method that chooses pages for each generated token, over a `PagedCache`: nothing waits for the device.

Shape letters as in `paged_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.decode_layer import project
from ..ops.paged_attention import PagesToRead, attend_pages, gather_pages, page_bounds
from ..ops.rotary import rotate
from .attachment import Program
from .backbone import Backbone
from .decode_step import mlp, norm, project_heads
from .fast_decode import StaticCache, has_fused_step
from .paged_cache import PagedCache, PagedLayer


@dataclass(frozen=True)
class StepPlace:
    """Where a step stands, the same in all layers.

    Attributes:
        true_BQ: positions of its tokens, int64; -1 = none. places_BQ: where they are written.
        touched_B1n: pages that may hold one of them. there_B1nW1: which of their places hold a token, bool.
        bias_B1P: see `PagedTokenMethod.page_bias`.
    """

    true_BQ: Tensor
    places_BQ: Tensor
    touched_B1n: Tensor
    there_B1nW1: Tensor
    bias_B1P: Tensor


def place_of_step(cache: PagedCache) -> StepPlace:
    """The place of the next step."""
    page, num_pages, newest_B = cache.method.knobs.page, cache.num_pages, cache.positions_B
    rows = torch.arange(1 - cache.recent_BQ.shape[1], 1, device=newest_B.device)
    true_BQ = newest_B[:, None] + rows
    there_BQ = true_BQ >= cache.first_B[:, None]
    back = torch.arange(-(-cache.method.num_revised // page), -1, -1, device=newest_B.device)
    touched_Bn = (newest_B[:, None] // page - back).clamp(min=0)
    places_BnW = touched_Bn[..., None] * page + torch.arange(page, device=newest_B.device)
    return StepPlace(
        true_BQ.masked_fill(~there_BQ, -1),
        true_BQ.masked_fill(~there_BQ, num_pages * page - 1),
        touched_Bn[:, None],
        (places_BnW <= newest_B[:, None, None])[:, None, ..., None],
        cache.method.page_bias(newest_B, num_pages),
    )


class PagedProgram:
    """Attention of a step's tokens over a `PagedCache` (a `Program`); the stock model turns queries and keys.

    Attributes:
        at: the place of the running step.
    """

    def __init__(self, cache: PagedCache, kv_budget: int) -> None:
        self._cache = cache
        self._num_chosen = cache.method.num_chosen(kv_budget, cache.num_pages)
        self.at = place_of_step(cache)

    def begin_step(self) -> tuple[Tensor, Tensor]:
        cache = self._cache
        cache.recent_BQ.copy_(torch.cat([cache.recent_BQ[:, 1:], cache.tokens_B[:, None]], 1))
        self.at = place_of_step(cache)
        return cache.recent_BQ, self.at.true_BQ.clamp(min=0)

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """There are no bookmarks."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        method, own, true_BQ = self._cache.method, self._cache.layers[layer], self.at.true_BQ
        for rows, new in ((own.keys, k), (own.values, v)):
            rows.flatten(2, 3).scatter_(2, self.at.places_BQ[:, None, :, None].expand_as(new), new)
        read = PagesToRead(None)
        if layer >= method.knobs.num_dense_layers:
            read = method.read_pages(own.state, self._chosen(own, q), true_BQ)
        out, lse = attend_pages(q, own.keys, own.values, read, true_BQ, own.tally, scale, softcap)
        if read.pages_BJn is not None:
            out = method.finish(own.state, out, lse)
        return out.to(q.dtype).transpose(1, 2)

    def _chosen(self, own: PagedLayer, q_BHQD: Tensor) -> Tensor:
        """Pages for the newest token, int64 [B, J, n]; those that don't exist yet fill up."""
        method, at = self._cache.method, self.at
        keys = gather_pages(own.keys, at.touched_B1n).unflatten(2, (-1, own.keys.shape[3]))
        index = at.touched_B1n[..., None].expand(-1, keys.shape[1], -1, keys.shape[4])
        for box, corner in zip((own.low, own.high), method.corners(keys, at.there_B1nW1), strict=True):
            box.scatter_(2, index, corner)
        query_BKGD = q_BHQD[:, :, -1].unflatten(1, (keys.shape[1], -1))
        scores = method.page_scores(page_bounds(query_BKGD, own.low, own.high)) + at.bias_B1P
        return scores.topk(self._num_chosen, dim=2, sorted=False).indices


class StepProgram(Program, Protocol):
    """A program that says what each step feeds."""

    def begin_step(self) -> tuple[Tensor, Tensor]:
        """Tokens of the next step and their positions, int64 [B, Q] each; the newest token is the last of its row."""
        ...


class StepCache(StaticCache, Protocol):
    """A cache whose `places` bound the positions of its tokens, too."""

    def advance(self) -> None:
        """The next token stands one place further."""
        ...


class PagedStep:
    """Feeds the cache's newest tokens and those that are revised through the stock model; its program must be running.

    Attributes:
        layers: what runs the layers, for reports.
    """

    layers = "stock layers"

    def __init__(self, backbone: Backbone, cache: StepCache, program: StepProgram) -> None:
        self._backbone = backbone
        self._cache = cache
        self._program = program

    def __call__(self) -> Tensor:
        """Logits [B, vocabulary] behind the newest tokens."""
        logits_BV = self._logits(*self._program.begin_step())
        self._cache.advance()
        return logits_BV

    def _logits(self, tokens_BQ: Tensor, positions_BQ: Tensor) -> Tensor:
        """Those behind the last token of each row, [B, vocabulary]."""
        found = self._backbone.model(input_ids=tokens_BQ, position_ids=positions_BQ, use_cache=False, logits_to_keep=1)
        logits: Tensor = found.logits[:, -1]
        return logits


class FusedPagedStep(PagedStep):
    """The same with the layers of a Llama-type model (`fused_obstacle`), on the weights that its modules hold."""

    layers = "fused layers"

    def __init__(self, backbone: Backbone, cache: StepCache, program: StepProgram) -> None:
        super().__init__(backbone, cache, program)
        self._head: Any = backbone.model.get_output_embeddings()
        # A captured graph keeps addresses, and the shared table moves when it grows: this step has its own.
        backbone.require_positions(cache.places)
        positions = torch.arange(cache.places, device=backbone.device)
        self._cos, self._sin = (x.clone() for x in backbone.rope(0).at(positions))

    def _logits(self, tokens_BQ: Tensor, positions_BQ: Tensor) -> Tensor:
        decoder, shape = self._backbone.decoder, tokens_BQ.shape
        x_NE = decoder.embed_tokens(tokens_BQ).flatten(0, 1)
        turn = self._cos[positions_BQ][:, None], self._sin[positions_BQ][:, None]
        for layer, module in enumerate(decoder.layers):
            x_NE = mlp(module, self._attention(layer, module, x_NE, turn))
        newest_BE = x_NE.unflatten(0, shape)[:, -1].contiguous()
        return project(norm(decoder.norm, newest_BE), [self._head.weight], [self._head.bias])

    def _attention(self, layer: int, module: Any, x_NE: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        backbone, attention = self._backbone, module.self_attn
        K, D, Q = backbone.num_kv_heads, backbone.head_dim, turn[0].shape[2]
        heads_NHD = project_heads(module, x_NE).unflatten(-1, (-1, D))
        q, k, v = heads_NHD.split([backbone.num_heads, K, K], 1)
        if hasattr(attention, "q_norm"):
            q, k = norm(attention.q_norm, q), norm(attention.k_norm, k)
        q, k, v = (x.unflatten(0, (-1, Q)).transpose(1, 2) for x in (q, k, v))
        out_BQHD = self._program.attend(layer, rotate(q, *turn), rotate(k, *turn), v, D**-0.5, None)
        return project(out_BQHD.flatten(0, 1).flatten(1), [attention.o_proj.weight], [attention.o_proj.bias], x_NE)


def paged_step(backbone: Backbone, cache: StepCache, program: StepProgram, fused: bool) -> PagedStep:
    """The step over a cache; with `fused`, of fused layers where `has_fused_step`."""
    return (FusedPagedStep if fused and has_fused_step(backbone) else PagedStep)(backbone, cache, program)
