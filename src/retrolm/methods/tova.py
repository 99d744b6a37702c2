"""TOVA: keep what the last token attends to (paper section 3.2), once after the prefill."""

from __future__ import annotations

from torch import Tensor

from .base import METHODS
from .prune_base import PromptStates, PruneMethod, keep_last


@METHODS.register("tova")
class TOVAMethod(PruneMethod):
    """Score = attention weight of the prompt's last token, mean over all heads: a layer's KV heads keep the same.

    The last token always stays. The paper drops a token at every step; here the prompt is pruned once.
    """

    name = "tova"
    paper = "https://arxiv.org/abs/2401.06104"
    summary = "dense prefill, then the tokens that the prompt's last token attends to"
    index = "attention it got"
    query = "last query of the prompt"
    scope = "layer"
    budget_split = "last token + best tokens of the layer"

    @property
    def num_forced(self) -> int:
        return 1

    def scores(self, prompt: PromptStates, num_kept: int) -> Tensor:
        weights_BKGT = prompt.weights(1)[..., 0, :-1]
        return keep_last(weights_BKGT.mean((1, 2))[:, None].expand(-1, weights_BKGT.shape[1], -1), 1)
