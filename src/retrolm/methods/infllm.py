"""InfLLM: a local window, the first tokens, and blocks found by a few representative tokens of theirs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .base import METHODS
from .knobs import positive
from .token_base import (
    ChunkView,
    Part,
    TokenMethod,
    distance,
    local_part,
    mean_query,
    places_of,
    positions_at,
)


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
        local = local_part(view, split.window, last)
        return [local] if view.cache.num_places <= split.window else [local, *self._far_parts(view, split)]

    def observe(self, view: ChunkView, parts: list[Part], weights: list[Tensor]) -> None:
        view.cache.add_marks(weights[0].sum(2))

    def _far_parts(self, view: ChunkView, split: BlockSplit) -> list[Part]:
        """First tokens and what fills no block yet, for queries whose window doesn't reach them; chosen blocks."""
        true_B1T, num_blocks = view.cache.true_BJT, tuple(_num_blocks(view, split))
        reach = view.num_queries - split.window
        width = max(length + reach - n * split.block for length, n in zip(view.new.before, num_blocks, strict=True))
        loose = view.once(_loose_part, true_B1T, view.true_BQ, view.starts, split, num_blocks, width)
        num_chosen = min(split.top_k, max(num_blocks))
        if not num_chosen:
            return [loose]
        slots = view.once(_block_slots, true_B1T, view.true_BQ, split, num_blocks, num_chosen)
        best_Bn, attended_Bn = self._best_blocks(view, split, num_blocks)
        places = torch.add(slots.places_B1W, best_Bn[:, :, None], alpha=split.block).flatten(1)[:, None]
        if min(num_blocks) < max(num_blocks):  # another sample's block may stand behind this one's end
            places = places.clamp(max=view.cache.num_places - 1)
        allowed = slots.allowed_B1QS
        if attended_Bn is not None:
            allowed = allowed & attended_Bn.repeat_interleave(split.block, 1)[:, None, None]
        return [loose, Part(places, allowed, loose.q_positions_BQ, slots.k_positions_B1S)]

    def _best_blocks(
        self, view: ChunkView, split: BlockSplit, num_blocks: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """The unit's best blocks, best first, int64 [B, most chosen], and which of them it attends; None = all."""
        reps_BNHD: Tensor = view.cache.state["reps"]
        query_BHD = rotate(mean_query(view, view.q_BHQD), *_far_angle(view, split))
        scores_BN = (reps_BNHD.flatten(2) @ query_BHD.flatten(1)[..., None])[..., 0]
        if min(num_blocks) < max(num_blocks):
            scores_BN = scores_BN.masked_fill(~blocks_there(view, num_blocks), -torch.inf)
        return scores_BN.topk(min(split.top_k, max(num_blocks))).indices, None

    def _promote(self, view: ChunkView, split: BlockSplit) -> None:
        """Set the representatives of blocks that have become complete behind the window since the last unit."""
        state, now = view.cache.state, _num_blocks(view, split)
        done: list[int] = state.get("num_blocks", [0] * len(now))
        state["num_blocks"] = [max(d, n) for d, n in zip(done, now, strict=True)]
        changed = [d for d, n in zip(done, now, strict=True) if n > d]
        if changed:
            self._set_representatives(view, split, min(changed), max(state["num_blocks"]))

    def _set_representatives(self, view: ChunkView, split: BlockSplit, first: int, end: int) -> None:
        """Store the mean key of some blocks' representatives; samples without a block yet get it set again later."""
        cache, num_heads = view.cache, view.q_BHQD.shape[1]
        marks_BHT, keys_BKTD = cache.marks_BMT, cache.keys_BKTD
        assert marks_BHT is not None
        places_BnW = view.once(_block_places, cache.true_BJT, split, first, end, marks_BHT.shape[2])
        marks = marks_BHT.gather(2, places_BnW.flatten(1)[:, None].expand(-1, num_heads, -1))
        best_BHnR = marks.unflatten(2, places_BnW.shape[1:]).topk(min(self.knobs.repr_top_k, split.block)).indices
        picked_BKS = (places_BnW[:, None, :, :1] + best_BHnR).unflatten(1, (keys_BKTD.shape[1], -1)).flatten(2)
        rows = keys_BKTD.gather(2, picked_BKS[..., None].expand(-1, -1, -1, keys_BKTD.shape[3]))
        wide = torch.promote_types(keys_BKTD.dtype, torch.float32)
        reps_BnHD = rows.unflatten(2, (-1, *best_BHnR.shape[2:])).mean(4, dtype=wide).flatten(1, 2).transpose(1, 2)
        before = [cache.state["reps"][:, :first]] if first else []
        cache.state["reps"] = torch.cat([*before, reps_BnHD], 1)

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
    return rotate(q_BHQD, *_far_angle(view, split)).to(torch.promote_types(q_BHQD.dtype, torch.float32))


def blocks_there(view: ChunkView, num_blocks: tuple[int, ...]) -> Tensor:
    """Which blocks each sample has, bool [B, most blocks]."""
    found: Tensor = view.once(_there, num_blocks, max(num_blocks), view.true_BQ.device)
    return found


# --- the same in all layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slots:
    """Where chosen blocks are attended: places of block 0, and a part that holds all chosen ones but for its places."""

    places_B1W: Tensor
    allowed_B1QS: Tensor
    k_positions_B1S: Tensor


def _num_blocks(view: ChunkView, split: BlockSplit) -> list[int]:
    """Blocks of each sample that are complete behind the window."""
    return [max((length - split.num_init - split.window) // split.block, 0) for length in view.new.before]


def _loose_part(
    true_B1T: Tensor, true_BQ: Tensor, starts_B: Tensor, split: BlockSplit, num_blocks: tuple[int, ...], width: int
) -> Part:
    """Tokens behind the window in no block, of which a sample has `width` at most."""
    blocks_end = split.num_init + torch.tensor(num_blocks).to(true_B1T.device, non_blocking=True) * split.block
    in_block = (true_B1T >= split.num_init) & (true_B1T < blocks_end[:, None, None])
    ends = (starts_B - split.window + true_BQ.shape[1])[:, None, None]
    places = places_of((true_B1T >= 0) & (true_B1T < ends) & ~in_block, width)
    apart = distance(true_BQ, positions_at(true_B1T, places))
    return Part(places, apart >= split.window, true_BQ.clamp(0, split.window - 1), torch.zeros_like(places))


def _block_slots(
    true_B1T: Tensor, true_BQ: Tensor, split: BlockSplit, num_blocks: tuple[int, ...], num_chosen: int
) -> _Slots:
    """A sample with fewer blocks leaves the last ones empty."""
    there = _there(num_blocks, num_chosen, true_B1T.device).repeat_interleave(split.block, 1)
    allowed = there[:, None, None] & (true_BQ >= 0)[:, None, :, None]
    k_positions = torch.zeros_like(there, dtype=torch.int64)[:, None]
    return _Slots(_block_places(true_B1T, split, 0, 1, true_B1T.shape[2]), allowed, k_positions)


def _block_places(true_B1T: Tensor, split: BlockSplit, first: int, end: int, num_places: int) -> Tensor:
    """Places of the tokens of some blocks, [B, n, W], side by side; any, where a sample doesn't have the block."""
    text_starts_B1 = (true_B1T[:, 0] == 0).to(torch.int8).argmax(-1, keepdim=True)
    blocks = torch.arange(first, end, device=true_B1T.device) * split.block + split.num_init
    starts_Bn = (text_starts_B1 + blocks).clamp(max=num_places - split.block)
    return starts_Bn[..., None] + torch.arange(split.block, device=true_B1T.device)


def _there(num_blocks: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    return torch.arange(width, device=device) < torch.tensor(num_blocks).to(device, non_blocking=True)[:, None]


def _far_angle(view: ChunkView, split: BlockSplit) -> tuple[Tensor, Tensor]:
    """Cos and sin of the window's far end, [1, R]."""
    cos, sin = view.once(view.rope, view.once(_one_position, split.window - 1, view.true_BQ.device))
    return cos, sin


def _one_position(position: int, device: torch.device) -> Tensor:
    return torch.full((1,), position, device=device)
