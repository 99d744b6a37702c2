"""Quest: dense prefill, then for each generated token the pages of 16 tokens with the best bound on their scores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import METHODS
from .token_pages import PagedTokenMethod, page_extremes


@METHODS.register("quest")
class Quest(PagedTokenMethod):
    """A page's bound for a query head is the sum over channels of max(q·low, q·high), low and high its keys' extremes
    after RoPE; a KV head takes the largest bound of its query heads (published for one query head per KV head).

    The page of the current token is always chosen, as in the published kernels. The prompt up to its last token is
    read densely (the published LongBench runs feed the question token by token instead).
    """

    name = "quest"
    paper = "https://arxiv.org/abs/2406.10774"
    summary = "pages of 16 tokens per KV head, chosen for each generated token by a bound; dense prefill"
    index = "least and greatest key by channel, after RoPE"
    scope = "layer and KV head"
    budget_split = "pages of 16 tokens, the current one among them; the first two layers are left dense"

    @dataclass(frozen=True)
    class Knobs:
        """page: tokens of a page. num_dense_layers: first layers that attend everything."""

        page: int = 16
        num_dense_layers: int = 2

    def check_budget(self, kv_budget: int) -> None:
        self._refuse_budget(kv_budget, 3 * self.knobs.page, "the published least of three pages")

    def corners(self, keys_BKPWD: Tensor, there_B1PW1: Tensor) -> tuple[Tensor, Tensor]:
        return page_extremes(keys_BKPWD, there_B1PW1)

    def page_scores(self, bounds_BKGP: Tensor) -> Tensor:
        return bounds_BKGP.amax(2)
