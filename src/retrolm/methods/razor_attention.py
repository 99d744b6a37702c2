"""RazorAttention: retrieval heads keep everything, others first and recent tokens and one token for all the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.rotary import rotate
from .base import METHODS
from .knobs import positive
from .token_base import (
    ChunkView,
    NewTokens,
    Part,
    RepeatScores,
    RepeatText,
    Standins,
    TokenCache,
    TokenMethod,
    places_of,
    true_at,
)


@METHODS.register("razor_attention")
class RazorAttention(TokenMethod):
    """Retrieval heads are found once per model, in a text of random tokens that repeats itself: the KV heads (largest
    of their query heads) that attend most to what followed the token they stand at (induction heads), and those that
    attend most to that token itself (echo heads). They attend everything, which is reported apart as `dense_heads`;
    the budget is that of the others.

    In these, when a text no longer fits, the tokens between the first and the recent ones give way to a compensation
    token: their mean key, after RoPE, and mean value, with the log of their number added to its logit. The window
    slides over the answer, and what leaves it joins the means. The paper keeps a fifth of the text (at least 4000
    tokens) in these heads; here it is what the budget holds, however long the text.

    State per layer: `key_sum`, `value_sum` [B, K, D], float32 or wider, of what was given up; `count` int64 [B], how
    many tokens that is, and `given_up`, the same on the host; `frees`, whether no head of the layer needs them.
    """

    name = "razor_attention"
    paper = "https://arxiv.org/abs/2407.15891"
    summary = (
        "retrieval heads attend everything; others first and recent tokens and one for all the rest; dense prefill"
    )
    prefill = "dense"
    index = "place in the text; mean key and value of what was given up"
    scope = "all layers; retrieval heads (14% by induction, 1% by echo) apart"
    when = "each generated token"
    budget_split = "4 first + recent tokens + 1 compensation token; retrieval heads attend everything"
    keeps = "all tokens in layers with a retrieval head, else first and recent ones; on the device"
    positions = "true; the compensation token's key is a mean after RoPE"
    exact_when = "kv_budget ≥ prompt and answer"
    true_positions = True

    @dataclass(frozen=True)
    class Knobs:
        """num_sink: first tokens. num_recent: recent ones, the current included; None = what the budget leaves.

        induction_share, echo_share: retrieval heads, of all KV heads of layers that choose, rounded up (0 = none).
        compensation: "weighted" by the number of tokens (the paper), "plain" without (as a published code base has
            it), or "none".
        num_random, repeats: the text that retrieval heads are found in: so many random tokens (None = 2500, or what
            the model's window holds), so many times.
        """

        num_sink: int = 4
        num_recent: int | None = None
        induction_share: float = 0.14
        echo_share: float = 0.01
        compensation: Literal["weighted", "plain", "none"] = "weighted"
        num_random: int | None = None
        repeats: int = 4

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "num_sink", "num_recent")
        for knob, least in (("num_random", 2), ("repeats", 2)):
            value = getattr(self.knobs, knob)
            if value is not None and value < least:
                raise UserError(f"{self.name}.{knob} must be at least {least}, got {value!r}.")
        for knob in ("induction_share", "echo_share"):
            if not 0 <= getattr(self.knobs, knob) <= 1:
                raise UserError(f"{self.name}.{knob} must be from 0 to 1, got {getattr(self.knobs, knob)!r}.")

    def check_budget(self, kv_budget: int) -> None:
        needed = self.knobs.num_sink + (self.knobs.num_recent or 1) + 1
        self._refuse_budget(kv_budget, needed, "first and recent tokens and the compensation token")

    # --- which heads ----------------------------------------------------------------------------------------------

    @property
    def repeat_text(self) -> RepeatText | None:
        if not self.knobs.induction_share and not self.knobs.echo_share:
            return None
        return RepeatText(self.knobs.num_random, self.knobs.repeats)

    def dense_heads(self, scores: RepeatScores) -> Tensor:
        induction = _best(scores.induction_LK, self.knobs.induction_share)
        return induction | _best(scores.echo_LK, self.knobs.echo_share)

    # --- what they attend -----------------------------------------------------------------------------------------

    def select(self, view: ChunkView) -> list[Part] | None:
        if view.new.is_prefill or max(view.new.before) < view.kv_budget:
            return None
        self._give_up(view)
        true_B1T, kept = view.cache.true_BJT, self._kept(view.cache)
        if view.dense_heads is not None:
            kept = kept | view.dense_heads[:, None]
        allowed = kept & (true_B1T >= 0)
        parts = [Part(None, allowed[:, :, None], view.true_BQ, true_B1T.clamp(min=0))]
        return parts if self.knobs.compensation == "none" else [*parts, self._compensation(view, allowed.shape[1])]

    def keep(self, cache: TokenCache, new: NewTokens, kv_budget: int) -> Tensor | None:
        if cache.state.get("frees") is not True:
            return None
        width = max(length - gone for length, gone in zip(new.before, cache.state["given_up"], strict=True))
        return places_of(self._kept(cache) & (cache.true_BJT >= 0), width)

    def _kept(self, cache: TokenCache) -> Tensor:
        """First tokens and those behind what was given up, bool [B, 1, T]."""
        place_B1T = cache.true_BJT - self.knobs.num_sink
        return (place_B1T < 0) | (place_B1T >= cache.state["count"][:, None, None])

    def _num_recent(self, kv_budget: int) -> int:
        return self.knobs.num_recent or kv_budget - self.knobs.num_sink - (self.knobs.compensation != "none")

    def _give_up(self, view: ChunkView) -> None:
        """Add to the sums what has left the window since the last step."""
        state, num_sink = view.cache.state, self.knobs.num_sink
        if not state:
            _begin(view)
        num_kept = num_sink + self._num_recent(view.kv_budget)
        # The same twice: on the host for sizes, on the device for masks, so that neither waits for the other.
        given_up = [max(n + 1 - num_kept, 0) if n >= view.kv_budget else 0 for n in view.new.before]
        most = max(now - before for now, before in zip(given_up, state["given_up"], strict=True))
        count_B = (view.starts + 1 - num_kept).masked_fill(view.starts < view.kv_budget, 0)
        place_B1T = view.cache.true_BJT - num_sink
        leaving = (place_B1T >= state["count"][:, None, None]) & (place_B1T < count_B[:, None, None])
        for name, sums in zip(("key_sum", "value_sum"), _sums(view, places_of(leaving, most)), strict=True):
            state[name] = state[name] + sums
        state["given_up"], state["count"] = given_up, count_B

    def _compensation(self, view: ChunkView, num_heads: int) -> Part:
        """The part of the one token that stands for those given up; not for retrieval heads."""
        state, like = view.cache.state, view.cache.keys_BKTD
        count_B11 = state["count"][:, None, None]
        many = count_B11.clamp(min=1).to(state["key_sum"].dtype)
        key, value = ((state[name] / many)[:, :, None].to(like.dtype) for name in ("key_sum", "value_sum"))
        allowed = (count_B11 > 0).expand(-1, num_heads, -1)
        if view.dense_heads is not None:
            allowed = allowed & ~view.dense_heads[:, None]
        log_counts = many.log() if self.knobs.compensation == "weighted" else torch.zeros_like(many)
        place = (count_B11 + self.knobs.num_sink - 1).clamp(min=0)  # that of the last token given up
        return Part(None, allowed[:, :, None], view.true_BQ, place, Standins(key, value, log_counts))


def _best(scores_LK: Tensor, share: float) -> Tensor:
    """The heads with the highest scores, a share of those that have any, rounded up, bool [L, K]."""
    count = math.ceil(share * int(scores_LK.isfinite().sum()) - 1e-9)  # 0.14 · 100 is 14, and a little
    best = scores_LK.flatten().topk(count).indices
    return torch.zeros_like(scores_LK, dtype=torch.bool).flatten().index_fill(0, best, True).view_as(scores_LK)


def _begin(view: ChunkView) -> None:
    """Nothing is given up yet; tokens are freed only where no head of the layer needs them all."""
    state, keys = view.cache.state, view.cache.keys_BKTD
    B, K, _, D = keys.shape
    state["key_sum"] = keys.new_zeros(B, K, D, dtype=torch.promote_types(keys.dtype, torch.float32))
    state["value_sum"], state["count"] = torch.zeros_like(state["key_sum"]), torch.zeros_like(view.new.starts)
    state["given_up"], state["frees"] = [0] * B, view.dense_heads is None


def _sums(view: ChunkView, places_B1S: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the keys, after RoPE, and of the values at these places, [B, K, D] each, float32 or wider."""
    cache, wide = view.cache, torch.promote_types(view.q_BHQD.dtype, torch.float32)
    index = places_B1S.clamp(min=0)[..., None].expand(-1, cache.keys_BKTD.shape[1], -1, cache.keys_BKTD.shape[3])
    cos, sin = view.rope(true_at(cache, places_B1S).clamp(min=0))
    rows = rotate(cache.keys_BKTD.gather(2, index), cos, sin), cache.values_BKTD.gather(2, index)
    key_sum, value_sum = (x.to(wide).masked_fill((places_B1S < 0)[..., None], 0.0).sum(2) for x in rows)
    return key_sum, value_sum
