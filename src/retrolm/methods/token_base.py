"""The contract of methods that choose token by token what each chunk attends, while reading and while answering.

A prompt is read in chunks of `chunk_tokens`; a generated token is a chunk of one. In every layer the engine calls, in
this order: `keep` (what of the cache stays, to make room), `select` (what the chunk attends, and where it stands), and
`observe` (the attention weights, for methods that ask for them). Keys are kept before RoPE, with their true positions,
and rotated at use to the positions that `select` gives. Layers whose parts hold the same tensors share what the engine
makes of them (masks, angles, counts): `Once` is how a method gives all layers the same.

Shape letters: B samples, H query heads, K KV heads, Q queries of the chunk, T cache places, S attended places, D head
dim; J is 1 where all heads share a choice, else K (or H, in what is allowed of the whole cache); M rows of marks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import UserError
from .base import Method, Rope
from .once import Once


@dataclass
class TokenCache:
    """What one layer keeps. Places are in reading order; without evictions a sample's tokens stand side by side.

    Attributes:
        keys_BKTD: before RoPE. values_BKTD.
        true_BJT: true positions, int64; -1 = nothing there.
        marks_BMT: a number per token that a method keeps of its own, float32; None until it sets them.
        state: whatever else a method keeps for this layer and batch.
    """

    keys_BKTD: Tensor
    values_BKTD: Tensor
    true_BJT: Tensor
    marks_BMT: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def num_places(self) -> int:
        return self.keys_BKTD.shape[2]

    def add_marks(self, marks_BMT: Tensor) -> None:
        """Add to the marks of the last tokens, as many as there are columns; marks begin at zero."""
        B, M, num_new = marks_BMT.shape
        before = [] if self.marks_BMT is None else [self.marks_BMT]
        missing = self.num_places - sum(marks.shape[2] for marks in before)
        self.marks_BMT = torch.cat([*before, marks_BMT.new_zeros(B, M, missing)], 2)
        self.marks_BMT[:, :, self.num_places - num_new :].add_(marks_BMT)


@dataclass(frozen=True)
class NewTokens:
    """The tokens that a chunk brings, the same in all layers.

    Attributes:
        true_BQ: true positions, int64 on the layer's device; -1 = padding, at the right of a prompt's end.
        before, num_new: tokens before the chunk and in it, for each sample; 0 in it once a prompt has ended.
        starts, counts: the same as int64 [B] on the layer's device.
        is_prefill: whether a prompt is read (its last token already belongs to the answer).
        once: works out what layers share.
    """

    true_BQ: Tensor
    before: list[int]
    num_new: list[int]
    starts: Tensor
    counts: Tensor
    is_prefill: bool
    once: Once = field(default_factory=Once)

    @property
    def has_padding(self) -> bool:
        return min(self.num_new) < self.true_BQ.shape[1]


@dataclass(frozen=True)
class QuestionQueries:
    """What a layer computes for the questions alone, before the prompts are read.

    Attributes:
        q_BHQD: queries before RoPE. there_BQ: which of them exist, bool.
    """

    q_BHQD: Tensor
    there_BQ: Tensor


@dataclass(frozen=True)
class ChunkView:
    """A chunk of new tokens in one layer. The cache ends with the chunk's own Q places.

    Attributes:
        q_BHQD: queries before RoPE. new: the tokens they belong to.
        rope: true or compact positions int64 [...] → cos, sin [..., R] of this layer.
        dense_heads: the KV heads of this layer that the method leaves dense, bool [K] on its device; None = none.
        question: of methods that ask for it, where there is one. shared: what a method keeps for the batch over all
            layers; they come in their order, in every chunk.
    """

    layer: int
    kv_budget: int
    cache: TokenCache
    q_BHQD: Tensor
    new: NewTokens
    rope: Rope
    dense_heads: Tensor | None = None
    question: QuestionQueries | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def true_BQ(self) -> Tensor:  # noqa: N802
        """True positions of the queries, int64; -1 = padding."""
        return self.new.true_BQ

    @property
    def num_queries(self) -> int:
        return self.q_BHQD.shape[2]

    @property
    def starts(self) -> Tensor:
        """Tokens before the chunk, int64 [B] on the layer's device."""
        return self.new.starts

    @property
    def once(self) -> Once:
        """Works out what layers share."""
        return self.new.once


@dataclass(frozen=True)
class Standins:
    """Tokens made up by a method to stand for others that it gave up.

    Attributes:
        keys_BKSD: as attended, after RoPE. values_BKSD.
        log_counts_BJS: added to the logits, float32 or wider: the log of how many tokens each counts as.
    """

    keys_BKSD: Tensor
    values_BKSD: Tensor
    log_counts_BJS: Tensor


@dataclass(frozen=True)
class RepeatText:
    """A text of random tokens that is repeated: what `TokenMethod.dense_heads` wants scores of.

    Attributes:
        num_random: its tokens; None = 2500, or as many as the model's window holds `repeats` times.
    """

    num_random: int | None = None
    repeats: int = 4


@dataclass(frozen=True)
class RepeatScores:
    """How each KV head looks back in such a text (the largest of its query heads), float32 [L, K] on the CPU.

    Attributes:
        echo_LK: attention weight on earlier places of the query's own token, mean over all repetitions but the first.
        induction_LK: the same on the places right behind those. Both are -inf in layers that choose nothing.
    """

    echo_LK: Tensor
    induction_LK: Tensor


@dataclass(frozen=True)
class Part:
    """Places that are attended, all under one softmax with the other parts.

    Attributes:
        places_BJS: cache places, int64, -1 = none; None = the whole cache in order.
        allowed_BJQS: which query may attend which place. A token may be allowed to a query in one part only.
        q_positions_BQ, k_positions_BJS: RoPE positions, int64; where nothing is allowed, any.
        standins: attended in place of the cache's tokens; `places_BJS` is None then, and `k_positions_BJS` only says
            where a sliding window finds them.
    """

    places_BJS: Tensor | None
    allowed_BJQS: Tensor
    q_positions_BQ: Tensor
    k_positions_BJS: Tensor
    standins: Standins | None = None


class TokenMethod(Method, ABC):
    """Base of methods of kind "tokens". The engine counts what is allowed, and refuses more than the budget.

    Attributes:
        needs_weights: whether `observe` is wanted; attention is then written out, a chunk at a time.
    """

    kind = "tokens"
    prefill: ClassVar[Literal["streaming", "dense"]] = "streaming"
    when: ClassVar[str] = "each chunk while reading, each generated token"
    needs_weights: ClassVar[bool] = False

    def chunk_tokens(self, kv_budget: int) -> int:
        """Prompt tokens read at a time."""
        return 512

    def dense_layers(self, num_layers: int) -> frozenset[int]:
        """Layers that are left dense on purpose; they are reported apart and not held to the budget."""
        return frozenset()

    @property
    def needs_question(self) -> bool:
        """Whether the question is to be read by itself before the prompt, so that views have its queries."""
        return False

    @property
    def repeat_text(self) -> RepeatText | None:
        """What the model must read before its first prompt so that `dense_heads` can be asked; None = no need."""
        return None

    def dense_heads(self, scores: RepeatScores) -> Tensor:
        """KV heads that attend everything on purpose, bool [L, K]; reported apart and not held to the budget."""
        return torch.zeros(scores.echo_LK.shape, dtype=torch.bool)

    @abstractmethod
    def select(self, view: ChunkView) -> list[Part] | None:
        """What the chunk attends; None = all tokens so far, at true positions."""

    def attend_prompt(
        self, view: ChunkView, scale: float, softcap: float | None, window: int | None
    ) -> tuple[Tensor, Tensor] | None:
        """Attention of a chunk that the method computes by itself, asked before `select`; None = it doesn't.

        Args:
            window: tokens that the model itself lets a query look back, itself included; None = all.

        Returns:
            [B, H, Q, D], and how many keys each query attended, int64 [B, J, Q].
        """
        return None

    def observe(self, view: ChunkView, parts: list[Part], weights: list[Tensor]) -> None:
        """See the attention weights of each part, float32 [B, H, Q, S]; rows of padding are zero."""

    @property
    def num_revised(self) -> int:
        """Generated tokens before the newest that pass through all layers again with it, and overwrite their keys.

        With any, a step's chunk is these and the newest token, and `merge` gives its attention output.
        """
        return 0

    def merge(self, view: ChunkView, out_BHQD: Tensor, lse_BHQ: Tensor) -> Tensor:
        """The attention output of a step that revises, [B, H, Q, D], from that over what was selected.

        Args:
            out_BHQD: zeros where a query was allowed nothing. lse_BHQ: log-sum-exp of its logits, -inf there.
        """
        return out_BHQD

    def keep(self, cache: TokenCache, new: NewTokens, kv_budget: int) -> Tensor | None:
        """Places of the cache that stay, int64 [B, J, n], ascending, -1 = none at the left; None = all stay.

        Called before a chunk enters; J must be that of the positions kept. Samples without new tokens must not lose
        anything that they would keep alone.
        """
        return None

    def _refuse_budget(self, kv_budget: int, needed: int, what: str) -> None:
        if kv_budget < needed:
            raise UserError(
                f"kv_budget={kv_budget} is too small for {self.name}: {what} takes at least {needed} tokens. "
                f"Raise the budget or lower {self.name}'s knobs (`retrolm methods --json`)."
            )


def places_of(mask_BJT: Tensor, width: int) -> Tensor:
    """Places where a mask holds, int64 [B, J, ≤ width], ascending, -1 at the left; the last ones if there are more."""
    width = min(width, mask_BJT.shape[-1])
    order = mask_BJT.to(torch.int8).argsort(dim=-1, stable=True)[..., mask_BJT.shape[-1] - width :]
    return order.masked_fill(~mask_BJT.gather(-1, order), -1)


def best_places(scores_BJT: Tensor, width: int) -> Tensor:
    """Places of the `width` best scores, int64 [B, J, ≤ width], best first; of equal ones the later place."""
    last = scores_BJT.shape[-1] - 1
    return last - scores_BJT.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :width]


def mean_query(view: ChunkView, q_BHQD: Tensor) -> Tensor:
    """Mean of the chunk's queries, however placed, over its tokens, [B, H, D] float32 or wider; zero without any."""
    wide = torch.promote_types(q_BHQD.dtype, torch.float32)
    if not view.new.has_padding:
        return q_BHQD.mean(2, dtype=wide)
    padding, counts = view.once(_padding, view.true_BQ, view.new.counts)
    return q_BHQD.masked_fill(padding, 0).sum(2, dtype=wide) / counts


def _padding(true_BQ: Tensor, counts_B: Tensor) -> tuple[Tensor, Tensor]:
    return (true_BQ < 0)[:, None, :, None], counts_B.clamp(min=1)[:, None, None]


def true_at(cache: TokenCache, places_BJS: Tensor) -> Tensor:
    """True positions of places, int64 [B, J, S]; -1 where there is none."""
    return positions_at(cache.true_BJT, places_BJS)


def positions_at(true_BJT: Tensor, places_BJS: Tensor) -> Tensor:
    """`true_at` of a cache with these positions."""
    J = max(places_BJS.shape[1], true_BJT.shape[1])
    places = places_BJS.expand(-1, J, -1)
    found = true_BJT.expand(-1, J, -1).gather(2, places.clamp(min=0))
    return found.masked_fill(places < 0, -1)


def distance(true_BQ: Tensor, true_BJS: Tensor) -> Tensor:
    """True distance of each query to each place, int64 [B, J, Q, S]; a large negative number where nothing is."""
    found = true_BQ[:, None, :, None] - true_BJS[:, :, None]
    return found.masked_fill((true_BJS < 0)[:, :, None], torch.iinfo(torch.int64).min // 2)


def local_part(view: ChunkView, window: int, num_last: int | None = None) -> Part:
    """The `window` most recent tokens of each query, itself included, at their true distances.

    Positions are counted from the start of the window, so that they stay small however long the text is.

    Args:
        num_last: places at the cache's end that are all there is to see; None = the whole cache.
    """
    found: Part = view.once(_local_part, view.cache.true_BJT, view.new.true_BQ, view.starts, window, num_last)
    return found


def _local_part(true_BJT: Tensor, true_BQ: Tensor, starts_B: Tensor, window: int, num_last: int | None) -> Part:
    places, start_B = None, (starts_B - window + 1).clamp(min=0)
    if num_last is not None:
        num_places = true_BJT.shape[2]
        places = torch.arange(num_places - num_last, num_places, device=true_BQ.device).expand(len(true_BQ), 1, -1)
        true_BJT = true_BJT[:, :, num_places - num_last :]
    apart = distance(true_BQ, true_BJT)
    return Part(
        places,
        (apart >= 0) & (apart < window),
        (true_BQ - start_B[:, None]).clamp(min=0),
        (true_BJT - start_B[:, None, None]).clamp(min=0),
    )
