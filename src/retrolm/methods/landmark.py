"""Landmark Attention: blocks of a text are found by the keys of trained landmarks that stand behind them.

Shape letters: H query heads, Q queries, P past blocks, k chosen blocks; Q and H are 1 where queries or heads share a
choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from .base import METHODS, Method
from .knobs import positive


@dataclass(frozen=True)
class LandmarkSplit:
    """What a budget is spent on, in places (tokens and landmarks).

    Attributes:
        block: places of a block. top_k: blocks that are retrieved at most. chunk: places of a prompt read at a time.
    """

    block: int
    top_k: int
    chunk: int

    @property
    def num_positions(self) -> int:
        """Positions that are used at most."""
        return (self.top_k + 1) * self.block + self.chunk


@METHODS.register("landmark")
class Landmark(Method):
    """Grouped softmax over retrieved blocks and the local chunk (`ops/landmark_attention.py`).

    A prompt is read in chunks of whole blocks. What of it comes before the chunk, and of a generated token before its
    own block, is memory: in each layer landmarks are scored, and `top_k` blocks are attended beside the local ones.

    *Positions.* Local places stand behind `top_k` + 1 slots of a block each. To be scored, the landmarks of the last
    `top_k` blocks stand in slots 1 to `top_k`, all earlier ones in slot 0. To be attended, the chosen block number i
    (in the order of the text, from 0) stands in slot i, or in slot i + 1 if it is one of the last `top_k`: where all of
    these are chosen they keep their true distances, and one slot is spare. With fewer blocks than `top_k` there are as
    many slots as blocks, and one.

    The published rule has the training context where `kv_budget` stands here; on that budget it is the same.
    """

    kind = "landmarks"
    name = "landmark"
    paper = "https://arxiv.org/abs/2305.16300"
    summary = "blocks found by the keys of landmark tokens that were trained for it (`retrolm train landmark`)"
    prefill = "streaming"
    budget_split = "a little under half retrieved blocks of 51 (with their landmarks) + the rest local chunk"
    keeps = "all tokens and landmarks, on the device"
    positions = "compact: retrieved blocks in slots, the chunk behind them; the most recent blocks at true distances"
    exact_when = "top_k blocks hold prompt and answer: then grouped softmax over all of it, by the model as trained"
    trained = "a landmark's embedding and an adapter, by language modelling"
    unit = "block of 50 tokens"
    index = "key of the block's landmark"
    query = "each token's queries"
    scope = "layer, query head and token (or a chunk's tokens, or all heads)"
    when = "each chunk while reading, each generated token"

    @dataclass(frozen=True)
    class Knobs:
        """weights: folder that `retrolm train landmark` wrote; there is no default.

        top_k: blocks retrieved; None = as many as fit under half of the budget, with the spare slot.
        retrieval: who shares a choice: "token" = each query head of each token has its own; "head" = all tokens of a
        chunk share one by the largest of their softmax weights; "layer" = all heads, too, by the largest of those.
        """

        weights: str | None = None
        top_k: int | None = None
        retrieval: Literal["token", "head", "layer"] = "token"

    knobs: Knobs

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "top_k")
        if self.knobs.weights is None:
            raise UserError(
                "landmark needs what was trained for it. Name the folder that `retrolm train landmark` wrote: "
                "--set landmark.weights=FOLDER"
            )

    def split(self, kv_budget: int, block: int) -> LandmarkSplit:
        """What a budget is spent on; raises `UserError` if it is too small."""
        top_k = self.knobs.top_k
        top_k = max(kv_budget // 2 // block - 1, 1) if top_k is None else top_k
        chunk = (kv_budget - (top_k + 1) * block) // block * block
        if chunk < block:
            raise UserError(
                f"kv_budget={kv_budget} is too small for landmark: top_k={top_k} retrieved blocks, a spare one and one "
                f"of the chunk take {(top_k + 2) * block} tokens. Raise the budget or lower landmark.top_k."
            )
        return LandmarkSplit(block, top_k, chunk)

    def choose(self, scores_HQP: Tensor, num_blocks: int) -> Tensor:
        """Numbers of the blocks with the best scores, int64 [H or 1, Q or 1, k], ascending."""
        if self.knobs.retrieval != "token":
            scores_HQP = scores_HQP.softmax(-1).amax(1, keepdim=True)
        if self.knobs.retrieval == "layer":
            scores_HQP = scores_HQP.amax(0, keepdim=True)
        # Of equal ones the later. In the first layer landmarks know nothing of their blocks: all old ones are equal.
        best = scores_HQP.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :num_blocks]
        return (scores_HQP.shape[-1] - 1 - best).sort(-1).values


def scoring_slots(num_past: int, num_slots: int, device: torch.device) -> Tensor:
    """The slot in which each past block's landmark is scored, int64 [P]; `num_slots` blocks are retrieved."""
    return (torch.arange(num_past, device=device) - (num_past - num_slots) + 1).clamp(min=0)


def attended_slots(chosen: Tensor, num_past: int) -> Tensor:
    """The slot in which each chosen block is attended, int64 [..., k] as `chosen`."""
    num_slots = chosen.shape[-1]
    return torch.arange(num_slots, device=chosen.device) + (chosen >= num_past - num_slots)
