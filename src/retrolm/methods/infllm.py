"""InfLLM: a local window, the first tokens, and blocks found by a few representative tokens of theirs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .base import METHODS
from .knobs import positive
from .token_base import ChunkView, Part, TokenCache, TokenMethod, distance, local_part, places_of, true_at


@dataclass(frozen=True)
class BlockSplit:
    """Tokens of the budget; `window` is what each query sees of its recent past, `top_k` counts blocks."""

    num_init: int
    window: int
    block: int
    top_k: int
    unit: int


@METHODS.register("infllm")
class InfLLM(TokenMethod):
    """Blocks are scored once per unit (`unit` prompt tokens or one generated token), one choice for all heads.

    A block's representatives are, for each head, its tokens that got most attention while they were in the local
    window. Tokens that have left the window but fill no block yet stay attended; they count as local.
    """

    name = "infllm"
    paper = "https://arxiv.org/abs/2402.04617"
    summary = "local window, first tokens, and blocks found by representative tokens"
    unit = "block of 128 tokens"
    index = "4 representative keys of each head"
    query = "mean query of the chunk"
    budget_split = "128 first + half local (window and what fills no block yet) + the rest blocks of 128"
    keeps = "all tokens, on the device (the paper keeps blocks in host memory)"
    positions = "true distances in the window; everything behind it at the window's far end"
    exact_when = "prompt and answer fit the window (half the budget, less a block and a unit)"
    needs_weights = True

    @dataclass(frozen=True)
    class Knobs:
        """num_init: first tokens. block: tokens of a block. top_k: blocks chosen. unit: prompt tokens read at a time.

        window: local window. repr_top_k: representatives of a block per head. None = by the budget.
        """

        num_init: int | None = None
        window: int | None = None
        block: int | None = None
        top_k: int | None = None
        unit: int | None = None
        repr_top_k: int = 4

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "num_init", "window", "block", "top_k", "unit", "repr_top_k")

    def check_budget(self, kv_budget: int) -> None:
        split = self._split(kv_budget)
        most = split.num_init + split.window + split.block - 1 + split.unit + max(split.top_k, 1) * split.block
        self._refuse_budget(kv_budget, max(most, 16), "first tokens, window, a unit and the blocks")

    def chunk_tokens(self, kv_budget: int) -> int:
        return self._split(kv_budget).unit

    def select(self, view: ChunkView) -> list[Part]:
        split = self._split(view.kv_budget)
        self._promote(view, split)
        last = min(view.cache.num_places, split.window - 1 + view.num_queries)
        places = torch.arange(view.cache.num_places - last, view.cache.num_places, device=view.true_BQ.device)
        local = local_part(view, split.window, places.expand(len(view.true_BQ), 1, -1))
        if view.cache.num_places <= split.window:
            return [local]
        return [local, self._far_part(view, split)]

    def observe(self, view: ChunkView, parts: list[Part], weights: list[Tensor]) -> None:
        view.cache.add_marks(weights[0].sum(2))

    def _far_part(self, view: ChunkView, split: BlockSplit) -> Part:
        """First tokens, chosen blocks and what fills no block yet, for queries whose window doesn't reach them."""
        true_B1T = view.cache.true_BJT
        num_blocks = ((view.starts - split.num_init - split.window) // split.block).clamp(min=0)
        waiting_from = (split.num_init + num_blocks * split.block)[:, None, None]
        block_B1T = (true_B1T - split.num_init).div(split.block, rounding_mode="floor")
        chosen_BN = self._chosen_blocks(view, split, num_blocks)
        in_chosen = chosen_BN[:, None].gather(2, block_B1T.clamp(0, chosen_BN.shape[1] - 1))
        in_block = (true_B1T >= split.num_init) & (true_B1T < waiting_from)
        ends = (view.starts - split.window + view.num_queries)[:, None, None]
        behind = (true_B1T >= 0) & (true_B1T < ends)
        places = places_of(behind & (~in_block | in_chosen), view.kv_budget)
        true_BJS = true_at(view.cache, places)
        apart = distance(view.true_BQ, true_BJS)
        far = view.true_BQ.clamp(0, 0)
        return Part(places, apart >= split.window, far + split.window - 1, true_BJS.clamp(0, 0))

    def _chosen_blocks(self, view: ChunkView, split: BlockSplit, num_blocks: Tensor) -> Tensor:
        """Which blocks the unit attends, bool [B, N], N at least 1."""
        reps: Tensor | None = view.cache.state.get("reps")
        if reps is None:
            return torch.zeros(len(num_blocks), 1, dtype=torch.bool, device=view.true_BQ.device)
        scores_BN = torch.einsum("bhd,bhnd->bn", self._mean_query(view, split), reps)
        there = torch.arange(reps.shape[2], device=reps.device) < num_blocks[:, None]
        ranked = scores_BN.masked_fill(~there, -torch.inf)
        best = ranked.topk(min(split.top_k, ranked.shape[1])).indices
        return torch.zeros_like(there).scatter(1, best, True) & there

    def _mean_query(self, view: ChunkView, split: BlockSplit) -> Tensor:
        """The unit's queries at the window's far end, mean over its tokens, [B, H, D] float32 or wider."""
        real = (view.true_BQ >= 0)[:, None, :, None]
        return far_queries(view, split, view.q_BHQD).masked_fill(~real, 0).sum(2) / real.sum(2).clamp(min=1)

    def _promote(self, view: ChunkView, split: BlockSplit) -> None:
        """Set the representatives of blocks that have become complete behind the window since the last unit."""
        state = view.cache.state
        done: list[int] = state.get("num_blocks", [0] * len(view.new.before))
        complete = [(length - split.num_init - split.window) // split.block for length in view.new.before]
        now = [max(d, n) for d, n in zip(done, complete, strict=True)]
        changed = [d for d, n in zip(done, now, strict=True) if n > d]
        state["num_blocks"] = now
        for block in range(min(changed), max(now)) if changed else ():
            self._set_representatives(view, split, block)

    def _set_representatives(self, view: ChunkView, split: BlockSplit, block: int) -> None:
        """Store the mean key of one block's representatives; samples without the block yet are set again later."""
        cache, num_heads = view.cache, view.q_BHQD.shape[1]
        first = split.num_init + block * split.block
        inside = (cache.true_BJT >= first) & (cache.true_BJT < first + split.block)
        places_B1S = places_of(inside, split.block)
        marks = _padded(cache, num_heads).gather(2, places_B1S.clamp(min=0).expand(-1, num_heads, -1))
        marks = marks.masked_fill(places_B1S < 0, -1.0)
        best_BHR = marks.topk(min(self.knobs.repr_top_k, marks.shape[2])).indices
        places_BHR = places_B1S.clamp(min=0).expand(-1, num_heads, -1).gather(2, best_BHR)
        group = num_heads // cache.keys_BKTD.shape[1]
        keys_BKTD = cache.keys_BKTD
        wide = torch.promote_types(keys_BKTD.dtype, torch.float32)
        picked = places_BHR.unflatten(1, (-1, group)).flatten(2)[..., None].expand(-1, -1, -1, keys_BKTD.shape[3])
        rep = keys_BKTD.gather(2, picked).to(wide).unflatten(2, (group, -1)).mean(3).flatten(1, 2)
        reps = cache.state.get("reps", rep[:, :, None, :][:, :, :0])
        if block < reps.shape[2]:
            reps[:, :, block] = rep
        else:
            reps = torch.cat([reps, rep[:, :, None]], 2)
        cache.state["reps"] = reps

    def _split(self, kv_budget: int) -> BlockSplit:
        def given(value: int | None, default: int) -> int:
            return default if value is None else value

        small = max(min(128, kv_budget // 16), 1)
        num_init, block = given(self.knobs.num_init, small), given(self.knobs.block, small)
        unit = given(self.knobs.unit, small)
        window = given(self.knobs.window, kv_budget // 2 - block - unit + 1)
        left = kv_budget - num_init - window - (block - 1) - unit
        return BlockSplit(num_init, window, block, given(self.knobs.top_k, left // block), unit)


def far_queries(view: ChunkView, split: BlockSplit, q_BHQD: Tensor) -> Tensor:
    """Queries at the window's far end, where everything behind it is seen from, [B, H, Q, D] float32 or wider."""
    cos, sin = view.rope(torch.full((1,), split.window - 1, device=q_BHQD.device))
    return rotate(q_BHQD, cos, sin).to(torch.promote_types(q_BHQD.dtype, torch.float32))


def _padded(cache: TokenCache, num_heads: int) -> Tensor:
    """Marks of all places, [B, H, T]; zero where none were given."""
    marks = cache.marks_BMT
    if marks is None:
        return torch.zeros(len(cache.keys_BKTD), num_heads, cache.num_places, device=cache.keys_BKTD.device)
    return torch.nn.functional.pad(marks, (0, cache.num_places - marks.shape[2]))
