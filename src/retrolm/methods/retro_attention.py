"""RetroAttention: attention outputs of recent generated tokens, corrected by pages that later tokens load.

A method that chooses pages is decorated: a step chooses pages for its newest token as the base method does, and the
last `window` - 1 tokens, which pass through all layers again, attend the ones among them that they have not seen. What
they had is kept as output and log-sum-exp, and merged; their corrected states go on to the next layers and overwrite
their keys and values there. Shape letters as in `token_pages`, and R revised tokens (Q = R + 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops.merge_attention import merge_attention
from ..ops.paged_attention import PagesToRead, allowed, merge_shifted
from .arkvale import ArkVale
from .base import METHODS
from .knobs import positive
from .quest_tokens import Quest
from .retro_exposure import Revises
from .token_base import ChunkView, Part
from .token_pages import PagedTokenMethod, PageState

Partials = Literal["kept", "recomputed"]


@dataclass(frozen=True)
class RetroKnobs:
    """window: tokens that a step computes, the newest included; 1 is the base method.

    partials: what becomes of a token's earlier outputs when its queries change, which the source leaves open: "kept",
        merged as they are with what new pages give (no more pages are read than the base reads), or "recomputed" with
        the token's present queries over all pages seen (up to `window` times the budget is read, and counted).
    """

    window: int = 2
    partials: Partials = "kept"


class RetroAttention(Revises, PagedTokenMethod):
    """The decorator, put in front of a page-choosing method in a class's bases.

    State per layer: `loaded`, the true position of the last token that each page was loaded for, int64 [B, J, P], -1 =
    none; `out` and `lse`, the outputs so far of the tokens that the next step revises. Over a cache of fixed shape a
    `PageState` has them, in Q rows that end with the newest token.
    """

    paper = "https://arxiv.org/abs/2508.09001"
    when = "each generated token, for those before it, too"
    keeps = "all tokens, and the outputs of the last `window` ones, on the device"

    def check_knobs(self) -> None:
        super().check_knobs()
        positive(self.name, self.knobs, "window")

    @property
    def num_revised(self) -> int:
        return self.knobs.window - 1

    def check_attended(self, attended: Mapping[str, int], num_tokens: int, num_generated: int, allowed: int) -> None:
        """The recomputed union is held to `window` budgets; see `RetroKnobs`."""
        if self.knobs.partials == "recomputed":
            allowed *= self.knobs.window
        super().check_attended(attended, num_tokens, num_generated, allowed)

    def select(self, view: ChunkView) -> list[Part] | None:
        chosen_BJP = self.choose(newest_of(view))
        if chosen_BJP is None:
            return None
        loaded = self._loaded(view, chosen_BJP)
        view.cache.state["loaded"] = torch.where(chosen_BJP, view.true_BQ[:, None, -1:], loaded)
        fresh = self._fresh(view, chosen_BJP, loaded)
        if self.meter is not None:
            self.meter.note(fresh.allowed_BJQS.sum(-1))
        if self.knobs.partials == "kept":
            return [fresh]
        return [self.part_of(view, view.cache.state["loaded"][:, :, None] >= view.true_BQ[:, None, :, None])]

    def _fresh(self, view: ChunkView, chosen_BJP: Tensor, loaded_BJP: Tensor) -> Part:
        """Of the pages chosen now, those that each query has not seen; no further page is read for the older ones."""
        part = self.part_of(view, chosen_BJP[:, :, None])
        page_BJS = part.k_positions_BJS.div(self.knobs.page, rounding_mode="floor")
        seen_BJ1S = loaded_BJP.gather(2, page_BJS)[:, :, None]
        return dataclasses.replace(part, allowed_BJQS=part.allowed_BJQS & (seen_BJ1S < view.true_BQ[:, None, :, None]))

    def merge(self, view: ChunkView, out_BHQD: Tensor, lse_BHQ: Tensor) -> Tensor:
        state, num_again = view.cache.state, view.num_queries - 1
        if self.knobs.partials == "kept" and num_again:
            old = merge_attention(
                state["out"][:, :, -num_again:],
                state["lse"][:, :, -num_again:],
                out_BHQD[:, :, :-1],
                lse_BHQ[:, :, :-1],
            )
            out_BHQD = torch.cat([old[0], out_BHQD[:, :, -1:]], 2)
            lse_BHQ = torch.cat([old[1], lse_BHQ[:, :, -1:]], 2)
        state["out"], state["lse"] = out_BHQD, lse_BHQ
        return out_BHQD

    def new_state(self, keys_BKPWD: Tensor, num_heads: int) -> PageState:
        if not self.num_revised:
            return PageState()
        B, K, P, _, D = keys_BKPWD.shape
        J, Q = 1 if self.heads_share else K, self.num_revised + 1
        wide = torch.promote_types(keys_BKPWD.dtype, torch.float32)
        counts = torch.zeros(B, J, Q, dtype=torch.int64, device=keys_BKPWD.device)
        out = torch.zeros(B, num_heads, Q, D, dtype=wide, device=keys_BKPWD.device)
        fresh = counts if self.knobs.partials == "recomputed" else None
        state = PageState(counts.new_empty(B, J, P), out, out[..., 0].clone(), fresh)
        state.clear()
        return state

    def read_pages(self, state: PageState, pages_BJn: Tensor, true_BQ: Tensor) -> PagesToRead:
        if state.loaded_BJP is None:
            return PagesToRead(pages_BJn)
        fresh = PagesToRead(pages_BJn, after_BJn=state.loaded_BJP.gather(2, pages_BJn))
        state.loaded_BJP.scatter_(2, pages_BJn, true_BQ[:, None, -1:].expand(pages_BJn.shape))
        if state.fresh_BJQ is None:
            return fresh
        num_pages = state.loaded_BJP.shape[2]
        state.fresh_BJQ.add_(allowed(fresh, true_BQ, num_pages, self.knobs.page).sum(-1))
        until, pages = state.loaded_BJP.topk(min(self.knobs.window * pages_BJn.shape[2], num_pages), dim=2)
        return PagesToRead(pages, until_BJn=until)

    def finish(self, state: PageState, out_BHQD: Tensor, lse_BHQ: Tensor) -> Tensor:
        if state.out_BHQD is None or state.lse_BHQ is None or self.knobs.partials == "recomputed":
            return out_BHQD
        return merge_shifted(state.out_BHQD, state.lse_BHQ, out_BHQD, lse_BHQ)

    def _loaded(self, view: ChunkView, chosen_BJP: Tensor) -> Tensor:
        """The last loads before this step, for as many pages as there are now."""
        before = view.cache.state.get("loaded", view.true_BQ.new_zeros(*chosen_BJP.shape[:2], 0))
        return torch.nn.functional.pad(before, (0, chosen_BJP.shape[2] - before.shape[2]), value=-1)


def newest_of(view: ChunkView) -> ChunkView:
    """The view with its last query alone."""
    num_again = view.num_queries - 1
    if view.new.is_prefill or not num_again:
        return view
    new = dataclasses.replace(
        view.new,
        true_BQ=view.true_BQ[:, -1:],
        before=[length + num_again for length in view.new.before],
        num_new=[1] * len(view.new.before),
        starts=view.new.starts + num_again,
        counts=torch.ones_like(view.new.counts),
    )
    return dataclasses.replace(view, q_BHQD=view.q_BHQD[:, :, -1:], new=new)


@METHODS.register("quest_retro")
class QuestRetro(RetroAttention, Quest):
    """RetroAttention over Quest, as published."""

    name = "quest_retro"
    summary = "Quest, with recent tokens' outputs corrected by the pages that later tokens load"

    @dataclass(frozen=True)
    class Knobs(RetroKnobs, Quest.Knobs):
        """Those of both."""


@METHODS.register("arkvale_retro")
class ArkValeRetro(RetroAttention, ArkVale):
    """RetroAttention over ArkVale."""

    name = "arkvale_retro"
    summary = "ArkVale, with recent tokens' outputs corrected by the pages that later tokens load"

    @dataclass(frozen=True)
    class Knobs(RetroKnobs, ArkVale.Knobs):
        """Those of both."""
