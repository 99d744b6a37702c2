"""Effective KV exposure: what queries have seen once they were revised, beside what they attended at their own step."""

from __future__ import annotations

import torch
from torch import Tensor


class ExposureMeter:
    """Adds up, over all generated tokens, heads and layers, what revisions let queries see.

    Set it as the `meter` of a method that revises, before generating, and read it afterwards.
    """

    def __init__(self) -> None:
        self._own_B: dict[torch.device, Tensor] = {}
        self._more_B: dict[torch.device, Tensor] = {}

    def note(self, num_new_BJQ: Tensor) -> None:
        """Note one step in one layer.

        Args:
            num_new_BJQ: tokens that each query attends for the first time; the newest query stands last, and those
                before it are revised.
        """
        sums_BQ = num_new_BJQ.double().mean(1)
        for found, part in ((self._own_B, sums_BQ[:, -1]), (self._more_B, sums_BQ[:, :-1].sum(1))):
            found[part.device] = found[part.device] + part if part.device in found else part

    def by_sample(self) -> list[float]:
        """Tokens seen after all revisions per token attended at a query's own step, for each sample of the batch.

        1 where nothing was revised. The last tokens, revised less often, count as they are.
        """
        own, more = (sum(part.cpu() for part in found.values()) for found in (self._own_B, self._more_B))
        return [] if isinstance(own, int) else (1 + more / own).tolist()


class Revises:
    """What methods that revise share: a meter that someone may attach for a while."""

    meter: ExposureMeter | None = None
