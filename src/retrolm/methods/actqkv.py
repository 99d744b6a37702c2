"""ActQKV: InfLLM's blocks, found by the queries of unusual tokens, and fewer of them in layers that look at few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from .base import METHODS
from .infllm import BlockSplit, InfLLM, blocks_there, far_queries
from .knobs import positive
from .token_base import ChunkView, Part


@METHODS.register("actqkv")
class ActQKV(InfLLM):
    """InfLLM with another query and another number of blocks.

    *Probe query.* A token's activation bias is how far its queries (all heads side by side, at the window's far end)
    stand from the mean of the prompt so far, (z − μ)² / (σ² + 0.01·mean σ²), mean over dimensions. The probe of a unit
    is the mean of its queries, weighted by that; blocks are ranked by its cosine with their representatives. While the
    prompt is read, 4 times the cosine with the question's own probe is added: the question is read first, by itself.

    *Cut-off.* Each time, a layer notes the entropy of the softmax of its relevances, over its greatest possible value.
    Once there are 100 of each layer, a generated token's layer takes its share, by the mean of its last 100 among its
    own and the later layers', of what is left of the step's blocks, at least `min_blocks` and at most `top_k`; before
    that layers share alike. Where all entropies are zero it takes the least.

    Where the published code and the paper part, or say nothing: statistics are those of one prompt, layer by layer, and
    start anew with each; the question is a text of its own (the code takes the queries of its most attended tokens in a
    prompt that begins with it); no layer attends more than `kv_budget` (the code's limit is twice its mean: `share`).

    State per layer: InfLLM's; `count` [B], `mean`, `spread` [B, H·D] (sum of squares) of the queries so far; `probe`,
    `question` [B, H, D]. Over layers: `entropies`, layer → the last ones [B, history] and how many there were [B];
    `left` [B], blocks that the step may still take.
    """

    name = "actqkv"
    paper = "https://arxiv.org/abs/2502.13542"
    summary = "InfLLM's blocks found by unusual tokens' queries and the question's; fewer in layers of low entropy"
    unit = "block of 32 tokens"
    index = "4 representative keys of each head"
    query = "mean query of the chunk, weighted by activation bias; the question's, too, while reading"
    budget_split = "64 first + 512 local (window and what fills no block yet) + the rest blocks of 32; less when small"
    exact_when = "prompt and answer fit the window (a quarter of the budget; nearly half below 2048)"

    @dataclass(frozen=True)
    class Knobs(InfLLM.Knobs):
        """Those of InfLLM, and

        question_weight: of the question's relevance while reading; 0 leaves the question out.
        relevance: "cosine", or "dot" (the paper's text leaves open which).
        statistics: what an activation is compared with, the "prompt" so far or its own "window" (unit) alone.
        share: of `top_k` in every layer that a step may spend in all; the published code has 0.5.
        min_blocks: least blocks of a layer; None = 32 for a `top_k` of 46, and in proportion.
        history: choices whose entropies are averaged. warm_up: choices in each layer before they count.
        temperature: of the softmax whose entropy is taken.
        """

        question_weight: float = 4.0
        relevance: Literal["cosine", "dot"] = "cosine"
        statistics: Literal["prompt", "window"] = "prompt"
        share: float = 1.0
        min_blocks: int | None = None
        history: int = 100
        warm_up: int = 100
        temperature: float = 1.0

    knobs: Knobs

    def check_knobs(self) -> None:
        super().check_knobs()
        positive(self.name, self.knobs, "min_blocks", "history", "warm_up")
        for knob, ok in (("share", 0 < self.knobs.share <= 1), ("temperature", self.knobs.temperature > 0)):
            if not ok:
                limit = " and at most 1" if knob == "share" else ""
                raise UserError(f"{self.name}.{knob} must be above 0{limit}, got {getattr(self.knobs, knob)!r}.")
        if self.knobs.question_weight < 0:
            raise UserError(f"{self.name}.question_weight must be at least 0, got {self.knobs.question_weight!r}.")

    @property
    def needs_question(self) -> bool:
        return self.knobs.question_weight > 0

    def check_budget(self, kv_budget: int) -> None:
        super().check_budget(kv_budget)
        split = self._split(kv_budget)
        if self._min_blocks(split) > max(split.top_k, 1):
            raise UserError(
                f"{self.name}.min_blocks={self.knobs.min_blocks} is more than kv_budget={kv_budget} has room for: "
                f"{split.top_k} blocks of {split.block} tokens. Lower it, or raise the budget."
            )

    def select(self, view: ChunkView) -> list[Part]:
        view.shared.setdefault("entropies", {}).setdefault(view.layer, None)
        view.cache.state["probe"] = self._probe(view)
        return super().select(view)

    # --- the query ------------------------------------------------------------------------------------------------

    def _probe(self, view: ChunkView) -> Tensor:
        """The unit's query for blocks, [B, H, D] float32 or wider."""
        queries = far_queries(view, self._split(view.kv_budget), view.q_BHQD)
        if not view.new.is_prefill:  # one token, whatever its weight
            return queries[:, :, -1]
        real_BQ = view.true_BQ >= 0
        state = view.cache.state if self.knobs.statistics == "prompt" else {}
        return weighted_query(queries, real_BQ, state)

    def _question(self, view: ChunkView) -> Tensor | None:
        """The question's query, by its own statistics; None where there is none or it doesn't count any more."""
        if view.question is None or not view.new.is_prefill:
            return None
        if "question" not in view.cache.state:
            queries = far_queries(view, self._split(view.kv_budget), view.question.q_BHQD)
            view.cache.state["question"] = weighted_query(queries, view.question.there_BQ, {})
        found: Tensor = view.cache.state["question"]
        return found

    def _relevance(self, probe_BHD: Tensor, reps_BNHD: Tensor) -> Tensor:
        """How much each block has to do with a query, [B, N]."""
        dots = (reps_BNHD.flatten(2) @ probe_BHD.flatten(1)[..., None])[..., 0]
        if self.knobs.relevance == "dot":
            return dots
        sizes = reps_BNHD.square().sum((2, 3)).sqrt() * probe_BHD.square().sum((1, 2)).sqrt()[:, None]
        return dots / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)

    # --- how many blocks ------------------------------------------------------------------------------------------

    def _best_blocks(
        self, view: ChunkView, split: BlockSplit, num_blocks: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        reps, there = view.cache.state["reps"], blocks_there(view, num_blocks)
        scores = self._relevance(view.cache.state["probe"], reps)
        question = self._question(view)
        if question is not None:
            scores = scores + self.knobs.question_weight * self._relevance(question, reps)
        self._note(view, scores, there)
        best = scores.masked_fill(~there, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, : split.top_k]
        num_chosen = self._num_chosen(view, split, there.sum(1))
        return best, torch.arange(best.shape[1], device=best.device) < num_chosen[:, None]

    def _note(self, view: ChunkView, scores_BN: Tensor, there_BN: Tensor) -> None:
        """Keep the entropy of this choice, of samples that made one."""
        before: tuple[Tensor, Tensor] | None = view.shared["entropies"][view.layer]
        if before is None:
            count = torch.zeros_like(view.starts)
            before = scores_BN.new_zeros(len(count), self.knobs.history), count
        found = normal_entropy(scores_BN / self.knobs.temperature, there_BN)
        chose = there_BN.any(1) & (view.new.counts > 0)
        after = torch.cat([before[0][:, 1:], found[:, None]], 1)
        view.shared["entropies"][view.layer] = torch.where(chose[:, None], after, before[0]), before[1] + chose

    def _num_chosen(self, view: ChunkView, split: BlockSplit, num_blocks: Tensor) -> Tensor:
        """Blocks that the layer attends, of those there are, [B], whole numbers."""
        if view.new.is_prefill:
            return torch.full_like(num_blocks, split.top_k)
        layers = list(view.shared["entropies"])
        if view.layer == layers[0]:
            view.shared["left"] = torch.full_like(num_blocks, 1) * (self.knobs.share * split.top_k * len(layers))
        left: Tensor = view.shared["left"].to(num_blocks.device)
        least, most = (num_blocks.clamp(max=limit) for limit in (self._min_blocks(split), split.top_k))
        taken = self._part_of_layer(view, layers, left).round().nan_to_num(0.0)
        taken = torch.maximum(torch.minimum(taken, most), least)
        view.shared["left"] = left - taken
        return taken

    def _part_of_layer(self, view: ChunkView, layers: list[int], left_B: Tensor) -> Tensor:
        """The layer's part in the blocks that its own and the later layers may take; NaN if all entropies are zero."""
        noted, place = [view.shared["entropies"][layer] for layer in layers], layers.index(view.layer)
        alike = left_B / (len(layers) - place)
        if any(one is None for one in noted):
            return alike
        later = [(past.sum(1) / count.clamp(1, past.shape[1])).to(alike.device) for past, count in noted[place:]]
        fewest = torch.stack([count.to(alike.device) for _, count in noted]).amin(0)
        return torch.where(fewest >= self.knobs.warm_up, left_B * (later[0] / torch.stack(later).sum(0)), alike)

    def _min_blocks(self, split: BlockSplit) -> int:
        given = self.knobs.min_blocks
        return max(round(split.top_k * 32 / 46), 1) if given is None else given

    def _split(self, kv_budget: int) -> BlockSplit:
        def given(value: int | None, default: int) -> int:
            return default if value is None else value

        knobs = self.knobs
        num_init, block = given(knobs.num_init, max(kv_budget // 32, 1)), given(knobs.block, max(kv_budget // 16, 1))
        block = min(block, 32) if knobs.block is None else block
        unit = given(knobs.unit, max(min(256, kv_budget // 8), 1))
        window = given(knobs.window, max(kv_budget // 4, min(512, kv_budget // 2 - block - unit + 1)))
        left = kv_budget - num_init - window - (block - 1) - unit
        return BlockSplit(num_init, window, block, given(knobs.top_k, left // block), unit)


def weighted_query(q_BHQD: Tensor, real_BQ: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Mean of queries weighted by their activation bias, [B, H, D]; those of a sample without any are zero.

    `state` holds the statistics so far (`count`, `mean`, `spread`), these queries included when it is left.
    """
    z_BQF, real = q_BHQD.transpose(1, 2).flatten(2), real_BQ[..., None]
    z_BQF = z_BQF.masked_fill(~real, 0.0)
    mean, variance = _joined_statistics(z_BQF, real, state)
    spread = variance + 0.01 * variance.mean(-1, keepdim=True)
    bias = ((z_BQF - mean[:, None]).square() / spread[:, None]).nan_to_num(0.0).mean(-1, keepdim=True)
    bias = bias.masked_fill(~real, 0.0)
    alike = real / real.sum(1, keepdim=True).clamp(min=1)
    total = bias.sum(1, keepdim=True)
    weights = torch.where(total > 0, bias / total, alike)
    return (weights * z_BQF).sum(1).unflatten(1, (q_BHQD.shape[1], -1))


def _joined_statistics(z_BQF: Tensor, real_BQ1: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, F] of all queries so far and these, by the parallel rule, which loses no digits."""
    num = real_BQ1.sum(1).to(z_BQF.dtype)
    own = z_BQF.sum(1) / num.clamp(min=1)
    spread = (z_BQF - own[:, None]).masked_fill(~real_BQ1, 0.0).square().sum(1)
    if "count" in state:
        before, total = state["count"], (state["count"] + num).clamp(min=1)
        apart = own - state["mean"]
        spread = state["spread"] + spread + apart.square() * before * num / total
        own, num = state["mean"] + apart * num / total, before + num
    state["count"], state["mean"], state["spread"] = num, own, spread
    return own, spread / num.clamp(min=1)


def normal_entropy(logits_BN: Tensor, there_BN: Tensor) -> Tensor:
    """Entropy of the softmax over what is there, over its greatest value, [B]: 0 = one has it all, 1 = all alike."""
    weights = logits_BN.masked_fill(~there_BN, -torch.inf).softmax(-1).nan_to_num(0.0)
    greatest = there_BN.sum(1).clamp(min=2).to(weights.dtype).log()
    return torch.special.entr(weights).sum(1) / greatest
