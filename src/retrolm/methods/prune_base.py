"""The contract of methods that prune after a dense prefill: what a layer saw of the prompt in, kept tokens out.

The prompt is read with dense attention; when a layer is done, its method says which tokens' keys and values stay, for
each KV head apart. Budgets per layer, forced tokens, ties and order are the base's business. Shape letters: B samples,
H query heads, K KV heads, G = H // K, T tokens of the prompt, n kept tokens, D head dim.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.causal import attention_mass, attention_weights
from .base import Method

GroupReduce = Literal["mean", "max"]


@dataclass(frozen=True)
class PromptStates:
    """What one layer computed for a prompt.

    Attributes:
        q_BHTD, k_BKTD, v_BKTD: queries, keys (both after RoPE) and values.
        scale, softcap, window: of the layer's attention.
    """

    layer: int
    q_BHTD: Tensor
    k_BKTD: Tensor
    v_BKTD: Tensor
    scale: float
    softcap: float | None = None
    window: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.k_BKTD.shape[2]

    def weights(self, num_queries: int) -> Tensor:
        """Attention weights of the last tokens, [B, K, G, num_queries, T], float32 or wider."""
        last = self.q_BHTD[:, :, -num_queries:]
        return attention_weights(last, self.k_BKTD, self.scale, self.softcap, self.window)

    def mass(self) -> Tensor:
        """Attention weight that each token got from all tokens, [B, K, G, T], float32 or wider."""
        return attention_mass(self.q_BHTD, self.k_BKTD, self.scale, self.softcap, self.window)


@dataclass(frozen=True)
class PruneKnobs:
    """Knobs that all of them have.

    Attributes:
        question_agnostic: prune what stands before the question, then read the question over what is left; by default
            the question is part of the prompt that is pruned, as in the papers.
    """

    question_agnostic: bool = False


class PruneMethod(Method):
    """Base of methods that keep a part of the prompt's tokens, chosen once, per layer and KV head."""

    kind = "prune"
    prefill = "dense"
    scope = "layer and KV head"
    when = "once, behind the prompt"
    keeps = "the kept tokens of each layer and KV head, on the device; the rest is freed layer by layer"
    positions = "true"
    exact_when = "kv_budget ≥ prompt"
    true_positions = True
    Knobs: ClassVar[type[PruneKnobs]] = PruneKnobs
    knobs: PruneKnobs

    @property
    def compact_positions(self) -> bool:
        """Whether kept keys move to adjacent positions that end where the prompt ends."""
        return False

    @abstractmethod
    def scores(self, prompt: PromptStates, num_kept: int) -> Tensor:
        """How much each token is worth keeping, [B, K, T]; infinity for those that must stay."""

    @property
    def num_forced(self) -> int:
        """Tokens that stay whatever their score."""
        return 0

    def check_budget(self, kv_budget: int) -> None:
        if kv_budget <= self.num_forced:
            raise UserError(
                f"kv_budget={kv_budget} leaves {self.name} nothing to choose: {self.num_forced} tokens always stay. "
                "Use a larger budget, or a smaller window of the method."
            )

    def layer_budgets(self, num_tokens: int, num_layers: int, kv_budget: int) -> list[int]:
        """Tokens that each layer keeps of `num_tokens`; their mean is at most `kv_budget`.

        Raises `UserError` for a budget that leaves nothing to choose.
        """
        if num_tokens <= kv_budget:
            return [num_tokens] * num_layers
        self.check_budget(kv_budget)
        return self.split_budget(num_tokens, num_layers, kv_budget)

    def split_budget(self, num_tokens: int, num_layers: int, kv_budget: int) -> list[int]:
        """`layer_budgets` for a text longer than a budget that leaves a choice: the same for all layers."""
        return [kv_budget] * num_layers

    def compress(self, prompt: PromptStates, num_kept: int) -> Tensor:
        """Places of the tokens that stay, int64 [B, K, num_kept], ascending; all of them if there are no more."""
        B, K, T = prompt.k_BKTD.shape[:3]
        if num_kept >= T:
            return torch.arange(T, device=prompt.k_BKTD.device).expand(B, K, T)
        return best_places(self.scores(prompt, num_kept), num_kept)


def best_places(scores_BKT: Tensor, num_kept: int) -> Tensor:
    """Places of the highest scores, int64 [B, K, num_kept], ascending. Of equal scores the later token stays (D23)."""
    order = scores_BKT.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
    return (scores_BKT.shape[-1] - 1 - order).sort(-1).values


def over_group(x_BKGT: Tensor, reduce: GroupReduce) -> Tensor:
    """One score per KV head from those of its query heads: [B, K, G, T] → [B, K, T]."""
    return x_BKGT.mean(2) if reduce == "mean" else x_BKGT.amax(2)


def keep_last(scores_BKT: Tensor, num_last: int) -> Tensor:
    """Scores of earlier tokens, with infinity for `num_last` tokens behind them."""
    return torch.nn.functional.pad(scores_BKT, (0, num_last), value=torch.inf)
